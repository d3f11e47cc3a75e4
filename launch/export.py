"""Turn an adapter of another program into this package's adapter folder.

Example: python launch/export.py --from_authors DIR --output_dir D
"""

import argparse
import sys

from comol_ds.errors import UserError
from comol_ds.export.authors import import_authors_adapter


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--from_authors",
        metavar="DIR",
        required=True,
        help="adapter folder written by the CoMoL authors' code (peft_type MoCoreLORA, adapter_model.bin)",
    )
    parser.add_argument("--output_dir", metavar="D", required=True, help="adapter folder to write")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace the adapter in D if there is one")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input (one line on stderr)."""
    options = parse(arguments)
    try:
        config = import_authors_adapter(
            options.from_authors, options.output_dir, overwrite=options.overwrite_output_dir
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output_dir}: CoMoL adapter, r={config.r}, {config.num_experts} experts, router={config.router}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
