"""Plan a run's memory and communication before it starts: python launch/plan.py --world_size 8 [flags of train.py]

Exit codes: 0 planned, whether it fits or not; 2 bad configuration or input, on one line.
"""

import json
import os
import sys

EXIT_BAD_INPUT = 2


def main(argv: list[str]) -> int:
    # before DeepSpeed is imported: a plan needs no accelerator, and stdout is for the plan, not for what was detected
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from comol_ds import demo
    from comol_ds.config_parser import parse_run_config
    from comol_ds.errors import UserError
    from comol_ds.planner.command import DEFAULTS, plan_run, split_flags
    from comol_ds.terminal import never_ask

    never_ask()

    try:
        options, flags = split_flags(argv)
        config = parse_run_config(flags, DEFAULTS)
        if config.model.model_name_or_path is None:
            config = parse_run_config(flags, demo.DEFAULTS | DEFAULTS | {"model_name_or_path": demo.MODEL_DIR})
        planned = plan_run(options, config)
    except UserError as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(planned if isinstance(planned, str) else json.dumps(planned, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
