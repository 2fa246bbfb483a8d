"""`pytest -p ldmperf.emulate`: Triton tests on a machine without a GPU, their kernels compiled and emulated.

Inside the session kernels take CPU tensors, `triton.runtime.driver.active.get_active_torch_device()` is the CPU,
and a launch with a finding (a race, an access out of bounds, ...) raises FindingsError with the kernel's line.

Every pytest session loads this file, as packages' plugins are: until it is asked for it imports nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .emulation import Emulation

# The plugin's name: an entry point in pyproject.toml, which `-p` takes.
NAME = "ldmperf.emulate"
_EMULATION: pytest.StashKey[Emulation] = pytest.StashKey()
_OF_WORKERS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("emulate", "emulated GPU for Triton kernels (ldmperf)")
    group.addoption(
        "--emulate", metavar="ARCH", help="run Triton kernels on CPU tensors as compiled for sm_80, sm_90"
    )
    group.addoption(
        "--emulate-accumulate",
        choices=("float32", "tensor-core"),
        default="float32",
        help="how a matmul sums: in float32, or aligned and cut off as the chips' tensor cores do",
    )
    group.addoption(
        "--emulate-tf32",
        choices=("truncate", "round"),
        default="truncate",
        help="what a matmul of float32 does with the bits that TF32 lacks",
    )
    group.addoption(
        "--emulate-perturb",
        metavar="SEED",
        type=int,
        help="approximate instructions (exponential, reciprocal, ...) err as much as documented",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Begins before conftest.py files are imported, which may ask for the active driver."""
    options = early_config.known_args_namespace
    if options.emulate is None and NAME not in options.plugins:
        return
    from ..options import CaseError
    from .emulation import emulated
    from .numerics import Numerics

    sums: Any = options.emulate_accumulate.replace("-", " ")
    numerics = Numerics(accumulate=sums, perturb=options.emulate_perturb, tf32=options.emulate_tf32)
    stack = contextlib.ExitStack()
    try:
        emulation = stack.enter_context(emulated(options.emulate or "sm_90", numerics=numerics, strict=True))
    except CaseError as wrong:
        raise pytest.UsageError(f"--emulate: {wrong}") from None
    early_config.stash[_EMULATION] = emulation
    early_config.add_cleanup(stack.close)


@pytest.fixture(scope="session")
def emulation(pytestconfig: pytest.Config) -> Emulation:
    """The emulated GPU of this session: `with emulation.expecting("race"):`. Skips a test where there is none."""
    if _EMULATION not in pytestconfig.stash:
        pytest.skip(f"needs an emulated GPU: pytest -p {NAME}")
    return pytestconfig.stash[_EMULATION]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A test fails by what its launches found and did not raise, too."""
    result = yield
    if _EMULATION in item.config.stash:
        from .emulation import FindingsError

        try:
            item.config.stash[_EMULATION].raise_findings()
        except FindingsError as found:
            raise pytest.fail.Exception(str(found), pytrace=False) from None
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """A finding is shown at the line that launches the kernel, not inside triton; `--full-trace` shows all."""
    if _EMULATION not in item.config.stash or call.excinfo is None or item.config.option.fulltrace:
        return
    import triton

    from .emulation import FindingsError

    error = call.excinfo.value
    if isinstance(error, FindingsError):
        folders = (str(Path(triton.__file__).parent), str(Path(__file__).parent), contextlib.__file__)
        call.excinfo = pytest.ExceptionInfo.from_exception(_outside(error, folders))


def _outside(error: BaseException, folders: tuple[str, ...]) -> BaseException:
    """The error without the frames of files in these folders, or of these files."""
    shown, rest = [], error.__traceback__
    while rest is not None:
        if not rest.tb_frame.f_code.co_filename.startswith(folders):
            shown.append(rest)
        rest = rest.tb_next
    for frame, following in zip(shown, [*shown[1:], None], strict=True):
        frame.tb_next = following
    return error.with_traceback(shown[0])


def pytest_report_header(config: pytest.Config) -> str | None:
    if _EMULATION not in config.stash:
        return None
    emulation = config.stash[_EMULATION]
    return f"emulated: {emulation.machine.arch} ({emulation.machine.chip}), {emulation.numerics.accumulate} sums"


def _counted(emulation: Emulation) -> dict[str, Any]:
    return {
        "launches": emulation.launches,
        "kernels": sorted(emulation.kernels),
        "instructions": emulation.instructions,
        "findings": emulation.raised,
        "seconds": emulation.seconds,
    }


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands on what it counted."""
    config = session.config
    if _EMULATION in config.stash and hasattr(config, "workeroutput"):
        config.workeroutput[NAME] = _counted(config.stash[_EMULATION])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    output = getattr(node, "workeroutput", {})
    if NAME in output:
        node.config.stash.setdefault(_OF_WORKERS, []).append(output[NAME])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if _EMULATION not in config.stash:
        return
    emulation = config.stash[_EMULATION]
    parts = [_counted(emulation), *config.stash.get(_OF_WORKERS, [])]
    launches, instructions, findings, seconds = (
        sum(part[name] for part in parts) for name in ("launches", "instructions", "findings", "seconds")
    )
    kernels = {name for part in parts for name in part["kernels"]}
    terminalreporter.write_sep("-", f"emulated {emulation.machine.arch}")
    terminalreporter.write_line(
        f"{launches:,} launches of {len(kernels):,} kernels, {instructions:,} thread instructions, "
        f"{findings:,} findings, {seconds:.1f} s in the emulator"
    )
