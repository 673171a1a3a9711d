"""`dia-diffusion NAME`: finds the command, and turns every way it can end into a line and an exit code."""

import argparse
import importlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType

from dia_diffusion.cli.options import OptionParser, Options, parse_options, program
from dia_diffusion.environment import __version__
from dia_diffusion.errors import NOT_ON_WINDOWS, InputError, RunError, Stopped, Terminated, number_of, one_line

# name -> description; `_parse` documents the contents of the module dia_diffusion.cli.NAME
COMMANDS = {
    "quickstart": "train twins on handwritten digits, sample, measure and draw the curve, in minutes on a CPU",
    "train": "train a recipe, or resume a run",
    "classify": "train a classifier, or resume its run",
    "sample": "draw images from a pipeline or run",
    "fid": "measure the Frechet distance of a pipeline, run or image folder to reference images",
    "ema": "make pipelines of other averages of a run's weights, of any width, and measure them",
    "stats": "make, show and compare files of the mean and covariance of images' features",
    "analyze": "measure what the attention unit of trained runs does: its maps, the noise of gradients",
    "accuracies": "compare the test accuracies of trained classifiers, over seeds",
    "gradcam": "draw where trained classifiers look in images",
    "params": "count what attention units add to a model, shared and individual; the paper's own counts",
    "curves": "train, measure and draw a study: units x batch sizes x seeds; or draw curves of several runs",
    "report": "write one HTML page about a run or a study: curves, samples, results, recipe",
    "convert": "turn official U-ViT weights into a pipeline folder",
    "export": "copy a pipeline for others, with the code that loads it by diffusers alone if asked",
    "push": "send a pipeline folder to the Hugging Face Hub, after showing what will be sent",
    "env": "print versions, devices and speed of this machine, for a bug report",
}
INTERNAL = ("trials",)
"""Commands that other commands start in child processes; the list of commands omits them."""
# Commands of earlier versions that are scripts of the repository now.
SCRIPTS = {"distortions": "tools/distortions.py", "train-features": "tools/train_features.py"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Exit codes: 0 done, 2 input or usage, 1 failure while running, 128 + n after signal n.

    If the reader of its output has exited, such as `| head`, a command ends quietly with the code of SIGPIPE.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else "--help"
    return _run_to_exit_code(name, lambda: _parse(name, arguments[1:]))


def run_script(
    name: str, model: type[Options], run: Callable[[Options], None], arguments: Sequence[str] | None = None
) -> int:
    """Runs a script outside the package as `main` runs a command.

    Args:
        name: of the script's file, for help and error lines.
        model: of its options.
        run: does the work.
        arguments: those of sys.argv if None.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    return _run_to_exit_code(name, lambda: partial(run, parse_options(model, arguments, name)))


def _run_to_exit_code(name: str, parse: Callable[[], Callable[[], None]]) -> int:
    try:
        try:
            return _run(name, parse)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # an error in the interpreter's own flush at exit could not be handled
    except BrokenPipeError:
        _discard_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        _discard_output()
        return _end(name, f"failed to write output: {error.strerror or error}", 1)


def _run(name: str, parse: Callable[[], Callable[[], None]]) -> int:
    """Runs a command and returns its exit code. Raises BrokenPipeError if nothing reads its output any more."""
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"dia-diffusion {__version__}")
        return 0
    try:
        if sys.platform == "win32":
            raise InputError(NOT_ON_WINDOWS)
        with _termination_as_interrupt():
            try:
                command = parse()
            except SystemExit:  # of --help
                return 0
            import_package()
            command()
    except InputError as error:
        return _end(name, f"error: {error}", 2, reported=False if error.alone else None)
    except RunError as error:
        return _end(name, f"failed: {error}", 1, reported=error.reported)
    except Stopped as stopped:
        return _end(name, str(stopped), 128 + stopped.signal_number)
    except KeyboardInterrupt as interrupt:
        line = "interrupted; completed work is kept, and the same command resumes"
        return _end(name, line, 128 + number_of(interrupt))
    except RuntimeError as error:
        import torch

        from dia_diffusion.distributed import lost_a_process

        if (lost := lost_a_process(error)) is not None:
            line = f"another process of this launch has ended or can't be reached ({lost})"
            return _end(name, f"failed: {line}; the same command resumes from what is written", 1)
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        return _end(name, f"failed: {str(error).split('. ')[0]}; use smaller batches or more train.accumulation", 1)
    except MemoryError as error:
        return _end(name, f"failed: {one_line(str(error)) or 'not enough memory'}", 1)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            raise
        reason = error.strerror or error
        where = f"failed: {reason}: {error.filename}" if error.filename else f"failed to write output: {reason}"
        return _end(name, where, 1)
    return 0


def _parse(name: str, arguments: Sequence[str]) -> Callable[[], None]:
    """The command with its options parsed and checked, without importing torch.

    A command's module has a model `Options`, or a function `parse(arguments)` that returns them, and `run(options)`.
    A command with several parts has a table PARTS instead: name -> (model, function of its options), and a DESCRIPTION.
    """
    if name in SCRIPTS:
        raise InputError(f"`{name}` is now a script: run `python {SCRIPTS[name]}` in a clone of the repository")
    if name not in COMMANDS and name not in INTERNAL:
        raise InputError(f"COMMAND must be one of {', '.join(COMMANDS)}, got {name!r}")
    module = importlib.import_module(f"dia_diffusion.cli.{name}")
    if hasattr(module, "parse"):
        return partial(module.run, module.parse(arguments))
    if not hasattr(module, "PARTS"):
        return partial(module.run, parse_options(module.Options, arguments, name))
    parser = OptionParser(f"dia-diffusion {name}", description=module.DESCRIPTION)
    parts = f"{{{','.join(module.PARTS)}}}"
    parser.add_argument("part", metavar=parts, help=f"`dia-diffusion {name} PART --help` lists its options")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the part")
    chosen = parser.parse_args(arguments)
    if chosen.part not in module.PARTS:
        raise InputError(f"PART must be one of {', '.join(module.PARTS)}, got {chosen.part!r}")
    model, run = module.PARTS[chosen.part]
    return partial(run, parse_options(model, chosen.arguments, f"{name} {chosen.part}"))


def import_package() -> None:
    """Runs the package's `__init__` if `dia_diffusion_command` has deferred it, and silences diffusers."""
    package = sys.modules["dia_diffusion"]
    if not hasattr(package, "__all__"):
        assert package.__spec__ is not None and package.__spec__.loader is not None
        package.__spec__.loader.exec_module(package)
    from diffusers.utils import logging

    # A user of this command can't act on its progress bars and loading warnings.
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _output_is_closed() -> bool:
    """Whether stdout or stderr is a pipe that nothing reads any more; other pipes and sockets can break too."""
    closed = select.POLLERR | select.POLLHUP  # Linux reports the first, macOS the second
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # no stream, or one that isn't a file
            poll.register(stream.fileno(), 0)
    return any(event & closed for _, event in poll.poll(0))


def _discard_output() -> None:
    """Discards output that stdout hasn't written yet, so that the interpreter's flush at exit succeeds."""
    with suppress(AttributeError, OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Makes SIGTERM end a command by an exception, as Ctrl-C does; training handles both signals itself."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return (
        f"usage: dia-diffusion COMMAND [options]\n\n{rows}\n\n"
        "`dia-diffusion COMMAND --help` lists a command's options; `dia-diffusion --version` prints the version."
    )


def _end(name: str, line: str, code: int, reported: bool | None = None) -> int:
    """Prints a command's last line: once per machine if its processes end the same way, else for each that has one."""
    if reported is None:
        reported = code != 1 and os.environ.get("LOCAL_RANK", "0") != "0"
    if not reported:
        print(f"{program(name)}: {line}", file=sys.stderr)
    return code
