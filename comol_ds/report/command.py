"""launch/router_report.py: flags, files, and the order of the page."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import matplotlib

from comol_ds.errors import UserError
from comol_ds.report import sections
from comol_ds.report.comparison import comparison
from comol_ds.report.page import page
from comol_ds.report.read import FILE_NAME, Run, read_run
from comol_ds.report.style import RC

_DESCRIPTION = """Show how a run's routers spread tokens over experts: one HTML file that needs no network, and its
pictures as PNG. Two runs are shown beside each other, with their differences."""
_FOLDER = "router_report"


@dataclass(frozen=True)
class Options:
    """Runs are folders or router_load.jsonl files."""

    runs: tuple[Path, ...]
    output_dir: Path


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse(argv: list[str]) -> Options:
    """The command's flags.

    Raises:
        UserError: a run is missing, or a flag is unknown.
    """
    parser = _Parser(prog="router_report.py", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help=f"a run's --output_dir, or its {FILE_NAME}")
    parser.add_argument("run2", metavar="RUN2", nargs="?", help="a second run to compare with")
    parser.add_argument("--output_dir", help=f"where the report goes (default: RUN/{_FOLDER})")
    values = parser.parse_args(argv)
    runs = tuple(Path(run) for run in (values.run, values.run2) if run is not None)
    folder = runs[0].parent if runs[0].is_file() else runs[0]
    return Options(runs, Path(values.output_dir) if values.output_dir else folder / _FOLDER)


def report(options: Options) -> tuple[Path, list[str]]:
    """Write report.html and the pictures.

    Returns:
        The page's path, and what the reader should know about the input, a line each.

    Raises:
        UserError: an unreadable or invalid run, or a folder that cannot be written.
    """
    runs = [read_run(path) for path in options.runs]
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)  # before the drawing, which can take a minute
        with matplotlib.rc_context(RC):
            html, pictures = _draw(runs)
        for name, data in pictures.files.items():
            (options.output_dir / name).write_bytes(data)
        path = options.output_dir / "report.html"
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output_dir {options.output_dir}: {error.strerror}; choose another folder") from error
    return path, [note for run in runs for note in run.notes]


def _draw(runs: list[Run]) -> tuple[str, sections.Pictures]:
    pictures, names = sections.Pictures(), _names(runs)
    told = [sections.Told.of(*one) for one in zip(runs, names, ("", "second_"), strict=False)]
    parts = [sections.summary(told)]
    if len(told) == 2:
        parts.append(comparison(*told, pictures))
    parts += [
        sections.mean_gates(told, pictures),
        sections.tasks(told, pictures),
        sections.depth_and_training(told, pictures),
        sections.trouble(told),
        sections.numbers(told),
        sections.meanings(),
    ]
    where = " and ".join(str(run.path) for run in runs)
    return page(f"Router load: {' and '.join(names)}", f"From {where}.", parts), pictures


def _names(runs: list[Run]) -> list[str]:
    """Folder names, or what else tells the runs apart."""
    names = [run.path.absolute().parent.name if run.path.name == FILE_NAME else run.path.stem for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]
