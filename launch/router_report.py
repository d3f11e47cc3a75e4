"""Show how a run's routers used their experts: python launch/router_report.py RUN [RUN2] [--output_dir D]

Exit codes: 0 the report is written; 2 bad input, on one line.
"""

import sys

EXIT_BAD_INPUT = 2


def main(argv: list[str]) -> int:
    from comol_ds.errors import UserError
    from comol_ds.report.command import parse, report

    try:
        path, notes = report(parse(argv))
    except UserError as error:
        print(f"router_report.py: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    for note in notes:
        print(f"note: {note}")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
