"""Entry point: ``torchrun -m megatron_sip.train --config configs/scratch_1b.yaml [section.key=value ...]``.

A configuration with a ``grpo`` section trains a judge or a rewriter instead of a policy (docs/teacher_training.md).

In: a configuration. Out: a run folder, and an exit code: 0 done, 85 saved but more to do, 86 saved but a server was
lost or a step was bad, 87 hung, 2 bad configuration or data, 1 anything else. SIGUSR2 prints what every thread is doing.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import sys
import traceback

from megatron_sip.config import ConfigError, RunConfig, describe, dump_config, load_config

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_sip.train", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Self-improving pretraining: one run, from a configuration file and overrides.",
        epilog="Settings, to be given in the file or as section.key=value (values are YAML):\n\n" + describe().replace("%", "%%"))
    parser.add_argument("--config", help="YAML file; see configs/")
    parser.add_argument("--print_config", action="store_true", help="print the whole configuration after overrides, then leave")
    parser.add_argument("--save-pools", metavar="FILE", help="debug.save_pools: record every outcome")
    parser.add_argument("--load-pools", metavar="FILE", help="debug.load_pools: train on recorded outcomes")
    parser.add_argument("--train-only", action="store_true", help="debug.train_only: train on the pools that the run folder holds, ask nobody")
    parser.add_argument("--generate-only", action="store_true", help="debug.generate_only: make pools, train nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(options.config, [*options.overrides, *_switches(options)])
        if options.print_config:
            print(dump_config(config), end="")
            return 0
        return _run(config)
    except ConfigError as error:
        return _refuse(error)


def _switches(options: argparse.Namespace) -> list[str]:
    """Debugging flags as overrides."""
    files = [f"debug.{name}={json.dumps(value)}" for name in ("save_pools", "load_pools") if (value := getattr(options, name)) is not None]
    return files + [f"debug.{name}=true" for name in ("train_only", "generate_only") if getattr(options, name)]


def _run(config: RunConfig) -> int:
    # Dynamo would compile pieces of Megatron at the first step; on a CPU that costs minutes and gains nothing.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1" if not os.path.exists("/dev/nvidiactl") else "0")
    from megatron_sip.data import DataError
    from megatron_sip.data.tokenizer import Tokenizer
    from megatron_sip.evaluation import EvaluationError
    from megatron_sip.policy import runtime as policy_runtime
    from megatron_sip.rollout.engine import RolloutError
    from megatron_sip.servers import ServerError
    from megatron_sip.teacher import TeacherError
    from megatron_sip.training.checkpoint_files import CheckpointError
    from megatron_sip.training.loop import Trainer

    trainer = None
    try:
        if config.grpo is not None:
            from megatron_sip.data.chat_tokenizer import ChatTokenizer as Tokenizer
            from megatron_sip.policy.hf_init import HfFolder, with_shape_of
            from megatron_sip.training.teacher import TeacherTrainer as Trainer

            if config.model.init_from is not None:
                config = with_shape_of(config, HfFolder(config.model.init_from))
        tokenizer = Tokenizer(config.data.tokenizer_model)
        runtime = policy_runtime.start(config)
        config = policy_runtime.settle(config, runtime)
        trainer = Trainer(config, runtime, tokenizer)
        return trainer.run()
    except (ConfigError, DataError, CheckpointError, ServerError, TeacherError, RolloutError, EvaluationError) as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        doing = trainer.watch.doing if trainer is not None else "start"
        print(f"error: rank {os.environ.get('RANK', '0')}, {doing}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        traceback.print_exception(error)
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        return EXIT_FAILED
    finally:
        if trainer is not None:
            trainer.close()
        policy_runtime.stop()


def _refuse(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return EXIT_BAD_INPUT


if __name__ == "__main__":
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    sys.exit(main())
