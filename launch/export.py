"""Turn a trained CoMoL adapter into what other programs load: see --help and docs/serving.md.

Exit codes: 0 done, 2 bad input, or a fault that --check has found (a line each on stderr).
"""

import sys

from comol_ds.errors import UserError
from comol_ds.terminal import never_ask


def main(argv: list[str]) -> int:
    try:
        from comol_ds.serving.command import export, parse

        for line in export(parse(argv)):
            print(line)
    except UserError as error:
        print(f"export.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    never_ask()
    sys.exit(main(sys.argv[1:]))
