"""Trains, evaluates and reports one run:  torchrun --nproc_per_node=8 launch/train.py CONFIG.yaml
[section.key=value ...]"""

import argparse
import sys

from partial_fc.parallel import process

if __name__ == "__main__":  # before torch is imported: that takes seconds, in which torchrun may end
    process.end_with_torchrun()
    process.end_without_traceback_on_sigint()
    process.outlive_terminal()

from torch.distributed.elastic.multiprocessing.errors import record

import partial_fc
from partial_fc.config_file import describe, load_config, without_dashes
from partial_fc.evaluate.runs import evaluate_run
from partial_fc.parallel import distributed, launcher
from partial_fc.parallel.watch import unlimited
from partial_fc.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="a YAML of what differs from the defaults")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help="given by the deepspeed launcher; LOCAL_RANK counts"
    )
    parser.add_argument("--print-config", action="store_true", help="print the merged config, documented, and stop")
    parser.add_argument("--version", action="version", version=f"partial_fc {partial_fc.__version__}")
    arguments = parser.parse_intermixed_args(without_dashes(sys.argv[1:]))  # overrides may stand behind --print-config
    try:
        launcher.take_local_rank(arguments.local_rank)
        config = load_config(arguments.config, arguments.overrides)
    except ValueError as error:
        launcher.end(str(error))
    if arguments.print_config:
        print(describe(config), end="")
        return
    with distributed.job(watch_seconds=config.run.timeout) as device:
        finished = train(config, device)
        if finished and config.evaluate.sets:
            with unlimited("the evaluation"):
                evaluate_run(config.run.dir, device, config.evaluate, checkpoints=config.checkpoint.dir)
        with distributed.together("writing the report"):
            if finished and distributed.rank() == 0:
                from partial_fc.report.page import write_report  # matplotlib: a second that no other rank needs

                write_report([config.run.dir], f"{config.run.dir}/report.html")
                print(f"report: {config.run.dir}/report.html")


if __name__ == "__main__":
    with process.ended_where_nobody_reads("error: nobody reads the output any more. The same command resumes the run"):
        record(main)()  # torchrun's summary then has an exception that nobody caught
