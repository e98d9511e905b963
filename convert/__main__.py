r"""Convert a checkpoint to a B'MOJO model that transformers loads, and back.

    python -m convert SOURCE DESTINATION                        any known format, recognised by its config.json
    python -m convert --to-bmojo [--every 2] SOURCE DESTINATION  attention layers become B'MOJO layers, for training
    python -m convert --export llama SOURCE DESTINATION          a model that is such a special case, in that format

SOURCE is a folder or a Hub id. Every tensor of it is used or named with the reason why not, every tensor of the result is
filled, and DESTINATION appears complete or not at all. A model is never held in memory as a whole (but by --verify).
"""

import argparse
import os
import signal
import sys
from pathlib import Path


if not __package__:  # run as `python path/to/convert`: the path then begins with the folder itself
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = "convert"


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    from .engine import DTYPES
    from .formats import FORMATS
    from .priming import EIDETIC, WINDOW

    names = ", ".join(form.name for form in FORMATS)
    parser = argparse.ArgumentParser(
        "python -m convert",
        description=__doc__,
        epilog=f"Known formats: {names}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id")
    parser.add_argument("destination", metavar="DESTINATION", help="folder, which must not exist")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of all tensors but an SSM's A_log, D and dt_bias")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default 5GB)")
    parser.add_argument("--force", action="store_true", help="replace DESTINATION once the conversion has succeeded")
    parser.add_argument("--verify", action="store_true", help="compare logits with the original implementation")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="take the tokenizer from this folder or Hub id")
    parser.add_argument("--revision", help="of a Hub id: branch, tag or commit")
    parser.add_argument("--export", metavar="FORMAT", help="write this format instead of ours")
    priming = parser.add_argument_group("priming")
    priming.add_argument("--to-bmojo", action="store_true", help="make B'MOJO layers of attention layers")
    priming.add_argument("--layers", type=layer_numbers, metavar="1,3,5", help="which, from 0 (default: all)")
    priming.add_argument("--every", type=int, metavar="N", help="every N-th, beginning with layer 0")
    priming.add_argument("--window", type=int, metavar="W", help=f"default: the model's own, or {WINDOW}")
    priming.add_argument("--eidetic", type=int, metavar="M", help=f"size of the eidetic memory (default {EIDETIC})")
    return parser.parse_args(arguments)


def layer_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def stop(*_):
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 after an error that was explained, 2 for a wrong option, 130 if stopped."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from .core import Refusal
    from .engine import convert

    options = vars(parse_options(arguments))
    endings = [
        getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")
    ]  # Windows lacks the second, nohup ignores it
    handled = [number for number in endings if number and signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, stop) for number in handled}  # these leave nothing behind either
    try:
        convert(options.pop("source"), options.pop("destination"), **options)
    except Refusal as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}. Nothing was written.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; nothing was written.", file=sys.stderr)
        return 130
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
