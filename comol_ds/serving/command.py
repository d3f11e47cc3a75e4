"""launch/export.py: flags, and what each --format does."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from comol_ds.adapters.adapter_folder import write_adapter
from comol_ds.adapters.base_fit import check_base
from comol_ds.adapters.kept_tokenizer import read_tokenizer_files, write_tokenizer_files
from comol_ds.errors import UserError
from comol_ds.export.authors import import_authors_adapter
from comol_ds.export.base_modules import read_base_modules
from comol_ds.export.hf_exact import write_hf_exact
from comol_ds.export.source import AdapterSource, base_folder, find_adapter
from comol_ds.export.staged_folder import staged_folder
from comol_ds.export.static_core import CORES, LEAST_SQUARES
from comol_ds.export.validate import SERVERS, check_folder, validate_folder
from comol_ds.export.vllm_lora import write_vllm_lora
from comol_ds.serving.approximate import Approximation, write_static_lora, write_static_merge

_DESCRIPTION = """Turn a trained CoMoL adapter into what other programs load. comol, hf-exact and vllm-lora compute what
was trained. lora and merged approximate it by one constant core per module and say by how much, in fidelity.json."""

_EXAMPLES = """examples:
  python launch/export.py --checkpoint out --format hf-exact --output_dir served
  python launch/export.py --checkpoint out --format lora --output_dir static
  python launch/export.py --check static --for sglang
  python launch/export.py --from_authors DIR --output_dir adapter"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command's flags.

    Raises:
        UserError: a flag is unknown, missing, or does not go with another one.
    """
    parser = _Parser(
        prog="export.py", description=_DESCRIPTION, epilog=_EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", metavar="DIR", help="a run folder, a checkpoint of it, or an adapter folder")
    what.add_argument("--check", metavar="DIR", help="say whether a server would load the adapter folder DIR as meant")
    what.add_argument("--from_authors", metavar="DIR", help="adapter of the authors' code, to be turned into ours")
    parser.add_argument("--format", choices=FORMATS, help="what to write")
    parser.add_argument("--output_dir", metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace an earlier export there")
    parser.add_argument("--for", dest="server", choices=SERVERS, help="the server, with --check")
    parser.add_argument("--model_name_or_path", metavar="BASE", help="base model, instead of the one the adapter names")
    group = parser.add_argument_group("approximations", "--format lora and merged")
    group.add_argument("--core", choices=CORES, default=LEAST_SQUARES, help="how the constant core is computed")
    group.add_argument(
        "--calibration", metavar="DATA", nargs="+",
        help="files, folders or hub names: a random half calibrates, the other measures (default: the run's"
        " validation split)",
    )  # fmt: skip
    group.add_argument("--max_calibration_records", type=int, default=1000, help="of both halves (default: 1000)")
    group.add_argument("--per_device_eval_batch_size", type=int, default=8, help="rows per forward pass (default: 8)")
    group.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of the base while it is calibrated and measured (default: that of its files)",
    )  # fmt: skip
    group.add_argument(
        "--allow_rounding_loss", action="store_true",
        help="merge updates too that the base's dtype cannot hold",
    )  # fmt: skip
    options = parser.parse_args(argv)
    _check_combination(options)
    return options


def _check_combination(options: argparse.Namespace) -> None:
    if options.check is not None:
        if options.server is None:
            raise UserError(f"--check {options.check}: give --for with one of {', '.join(SERVERS)}")
        return
    if options.output_dir is None:
        raise UserError("--output_dir is missing; name the folder to write")
    if options.checkpoint is not None and options.format is None:
        raise UserError(f"--format is missing; give one of {', '.join(FORMATS)}")
    for name in ("max_calibration_records", "per_device_eval_batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be a positive whole number")


def export(options: argparse.Namespace) -> list[str]:
    """Do what the flags say.

    Returns:
        Lines to print.

    Raises:
        UserError: bad input, or what --check finds; nothing is left half written.
    """
    if options.check is not None:
        return _check(options)
    if options.from_authors is not None:
        config = import_authors_adapter(
            options.from_authors, options.output_dir, overwrite=options.overwrite_output_dir
        )
        shape = f"r={config.r}, {config.num_experts} experts, router={config.router}"
        return [f"{options.output_dir}: CoMoL adapter, {shape}"]
    source = find_adapter(options.checkpoint, options.model_name_or_path)
    sources = [source.folder, source.base, source.tokenizer, *(options.calibration or _data_of(source))]
    with staged_folder(Path(options.output_dir), options.overwrite_output_dir, sources=sources) as folder:
        lines = FORMATS[options.format](source, folder, options)
        write_tokenizer_files(read_tokenizer_files(source.folder), folder)
    return [f"{source.folder} -> {options.output_dir}, {options.format}", *lines]


def _data_of(source: AdapterSource) -> list[str]:
    """What the run was trained and validated on, as far as its settings, which anybody may have edited, say so."""
    values = [(source.run or {}).get(name) for name in ("dataset", "eval_dataset")]
    return [entry for value in values if isinstance(value, list) for entry in value if isinstance(entry, str)]


def _check(options: argparse.Namespace) -> list[str]:
    problems = check_folder(options.check, options.server, options.model_name_or_path)
    if problems:
        raise UserError("\n".join(problems))
    return [f"{options.check}: {options.server} loads this as it is meant"]


def _comol(source: AdapterSource, folder: Path, options: argparse.Namespace) -> list[str]:
    write_adapter(source.tensors, replace(source.config, base_model_name_or_path=source.base), folder)
    return ["exact; read by PEFT with `import comol_ds` before"]


def _hf_exact(source: AdapterSource, folder: Path, options: argparse.Namespace) -> list[str]:
    tokenizer = base_folder(source.tokenizer) if source.tokenizer != source.base else None
    base = base_folder(source.base)
    _check_base(source)
    report = write_hf_exact(base, source.config, source.tensors, folder, tokenizer_folder=tokenizer)
    return ["exact; from_pretrained(..., trust_remote_code=True), vllm serve ... --trust-remote-code", *report.lines()]


def _vllm_lora(source: AdapterSource, folder: Path, options: argparse.Namespace) -> list[str]:
    _check_base(source)
    rank = write_vllm_lora(source.tensors, source.config, source.base, folder)
    validate_folder(folder, ("vllm",))
    return [f"exact in vLLM 0.32 with comol_ds installed beside it; --max-lora-rank {rank} or more; experimental"]


def _check_base(source: AdapterSource) -> None:
    """The formats that load no model ask the base's configuration; the others compare when they load it."""
    check_base(source.config, source.tensors, read_base_modules(source.base).sizes, str(source.folder), source.base)


def _lora(source: AdapterSource, folder: Path, options: argparse.Namespace) -> list[str]:
    return write_static_lora(source, folder, _approximation(options))


def _merged(source: AdapterSource, folder: Path, options: argparse.Namespace) -> list[str]:
    return write_static_merge(source, folder, _approximation(options))


def _approximation(options: argparse.Namespace) -> Approximation:
    return Approximation(
        core=options.core,
        calibration=options.calibration,
        max_records=options.max_calibration_records,
        batch_size=options.per_device_eval_batch_size,
        dtype=options.dtype,
        allow_rounding_loss=options.allow_rounding_loss,
    )


FORMATS: dict[str, Callable[[AdapterSource, Path, argparse.Namespace], list[str]]] = {
    "comol": _comol,
    "hf-exact": _hf_exact,
    "vllm-lora": _vllm_lora,
    "lora": _lora,
    "merged": _merged,
}
