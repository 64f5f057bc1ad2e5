"""From a configuration to a finished run: plugins, run directory, lock, start and resume."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from grpoforge import __version__, checkpoint
from grpoforge.assembly import assemble, check_workers, load_policy
from grpoforge.config import Config, RewardPart
from grpoforge.continuation import check_weights, commit_of, compare, weights_of
from grpoforge.distributed import Workers, local_device, start_workers, stop_workers
from grpoforge.errors import CheckpointError
from grpoforge.layers import build
from grpoforge.parts import resolve
from grpoforge.plugins import PluginHost, load_plugins
from grpoforge.policy import Policy
from grpoforge.run_dir import RunDir, default_output, write_json_atomic
from grpoforge.seeds import seed_everything
from grpoforge.sources import is_path
from grpoforge.trainer import Trainer
from grpoforge.types import RunSummary
from grpoforge_kernels import certify, dispatch

logger = logging.getLogger(__name__)

RUN_SCHEMA = 1
PACKAGES = ("grpoforge", "torch", "transformers", "datasets", "safetensors", "pluggy", "pydantic", "peft")


def check_kernels() -> None:
    """Stop unless the kernels that ``GRPOFORGE_KERNELS`` forces, if it is set, can run on this process's device.

    Raises:
        KernelError: they cannot, or there are none of that name.
    """
    dispatch.check_force(local_device().type)


def load_host(config: Config) -> PluginHost:
    """All plugins: installed ones, and the local files that ``config`` names."""
    return load_plugins([Path(file) for file in config.plugins])


def start(config: Config, output: Path | None) -> RunSummary | None:
    """Run ``config`` in a new run directory; None on ranks that do not talk.

    Raises:
        GrpoforgeError: see `grpoforge.parts.resolve`, `grpoforge.assembly.assemble` and `Trainer.run`. A run that
            fails before its first step is finished leaves nothing behind.
    """
    check_kernels()
    host = load_host(config)
    parts = resolve(config, host)
    workers = start_workers()
    try:
        path = Path(workers.from_main(str(output or default_output(config.recipe))))
        existed = path.exists()
        run_dir = RunDir.create(path) if workers.is_main else RunDir(path)
        with _held(run_dir, workers):
            trainer: Trainer | None = None
            try:
                policy = _load_policy(config, host, workers)
                trainer = assemble(config, host, parts, policy, run_dir, workers)
                if workers.is_main:
                    write_json_atomic(run_dir.run_json, describe_run(config, host, weights_of(policy)))
                return _finish(trainer, host, workers)
            except BaseException:
                if workers.is_main and (trainer is None or trainer.progress.step == 0):
                    _discard_unless_saved(run_dir, existed)
                raise
    finally:
        stop_workers()


def resume(config: Config, run_dir: RunDir, folder: Path | None) -> RunSummary | None:
    """Continue the run in ``run_dir`` from the checkpoint ``folder``, the newest good one by default.

    What was recorded after that checkpoint is repeated; later checkpoints are moved aside. A run without any
    checkpoint starts over.

    Raises:
        GrpoforgeError: as `start`; when ``folder`` is damaged, or the model or the seed is not what the run began
            with, nothing has changed.
    """
    check_kernels()
    recorded = read_run_config(run_dir)
    changes = compare(pin_paths(build([(str(run_dir.run_json), recorded)])), pin_paths(config))
    host = load_host(config)
    parts = resolve(config, host)
    _warn_about_changed_plugins(run_dir, host)
    workers = start_workers()
    try:
        with _held(run_dir, workers):
            found = _agree_on_checkpoint(run_dir, folder, workers)
            step = checkpoint.step_of(found) if found else 0
            policy = _load_policy(config, host, workers)
            weights: dict[str, str] = {}
            if workers.is_main:
                weights = weights_of(policy)
                check_weights(_read_run(run_dir).get("weights") or {}, weights, policy)
                wind_back(run_dir, found)
            trainer = assemble(config, host, parts, policy, run_dir, workers, first_step=step)
            if found is not None:
                trainer.restore(found)
            if workers.is_main:
                _log_resumed(trainer, run_dir, found, changes)
                if not trainer.is_finished and config.model_dump(mode="json") != recorded:
                    write_json_atomic(run_dir.run_json, describe_run(config, host, weights))
            return _finish(trainer, host, workers)
    finally:
        stop_workers()


def _finish(trainer: Trainer, host: PluginHost, workers: Workers) -> RunSummary | None:
    nothing_to_do = trainer.is_finished
    with _kept_from_collector():
        summary = trainer.run()
    if not workers.is_main:
        return None
    if not nothing_to_do:
        host.hook.run_finished(summary=summary)
    return summary


@contextlib.contextmanager
def _kept_from_collector() -> Iterator[None]:
    """What was imported and set up stays: Python's collector need not look through it in every step."""
    was_frozen = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()


def _load_policy(config: Config, host: PluginHost, workers: Workers) -> Policy:
    check_workers(config, workers)
    # A new adapter is drawn at random.
    seed_everything(config.seed)
    policy = load_policy(config, host)
    # Before the first step, on every rank: a kernel that is wrong on this machine is not used.
    certify.ensure(policy.device.type)
    return policy


def _held(run_dir: RunDir, workers: Workers) -> contextlib.AbstractContextManager[None]:
    """The lock of the run directory, on the rank that writes."""
    return run_dir.locked() if workers.is_main else contextlib.nullcontext()


def _discard_unless_saved(run_dir: RunDir, existed: bool) -> None:
    """Remove what this process made of the run directory, which was empty; a checkpoint of step 0 is kept."""
    if checkpoint.published(run_dir.checkpoints):
        return
    for path in run_dir.path.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if not existed:
        run_dir.path.rmdir()


def _agree_on_checkpoint(run_dir: RunDir, folder: Path | None, workers: Workers) -> Path | None:
    """The checkpoint to continue from, chosen by the main rank; None when there is none.

    Raises:
        CheckpointError: ``folder`` is damaged, or every checkpoint is.
    """
    found = folder
    if workers.is_main:
        if folder is not None:
            checkpoint.verify(folder)
        else:
            found = checkpoint.newest(run_dir.checkpoints, logger.warning)
            if found is None and checkpoint.published(run_dir.checkpoints):
                raise CheckpointError(
                    f"no checkpoint of {run_dir.path} is intact",
                    "restore one from a copy, or start a new run; nothing was changed",
                )
    agreed = workers.from_main(str(found or ""))
    return Path(agreed) if agreed else None


def wind_back(run_dir: RunDir, found: Path | None) -> None:
    """Forget what was recorded after the checkpoint ``found``; everything when there is none.

    Later checkpoints are moved aside rather than removed: they belong to a past that is now repeated, but somebody
    paid for them. Left in place they would count as the newest ones and push out those of the resumed run.

    Raises:
        CheckpointError: a file cannot be changed.
    """
    step = checkpoint.step_of(found) if found else -1
    run_dir.rewind(step)
    if found is None:
        shutil.rmtree(run_dir.tensorboard, ignore_errors=True)
    for later in checkpoint.published(run_dir.checkpoints):
        if checkpoint.step_of(later) <= step:
            continue
        aside = later.with_name(f"aside-{later.name}")
        try:
            if aside.exists():
                shutil.rmtree(aside)
            os.rename(later, aside)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {later} could not be moved aside: {error.strerror or error}",
                "check the permissions of the folder",
            ) from error
        logger.warning("%s is later than the step resumed from: it is now %s", later.name, aside.name)


def _log_resumed(trainer: Trainer, run_dir: RunDir, found: Path | None, changes: Sequence[str]) -> None:
    for change in changes:
        logger.warning("%s", change)
    step, max_steps = trainer.progress.step, trainer.schedule.max_steps
    if trainer.is_finished:
        logger.info("%s has finished (step %d of %d); `--max-steps N` trains on", run_dir.path, step, max_steps)
    elif found is None:
        logger.warning("%s has no checkpoint: starting over", run_dir.path)
    else:
        logger.info("resuming %s after step %d of %d", run_dir.path, step, max_steps)


def find_run(which: str, root: Path = Path("runs")) -> tuple[RunDir, Path | None]:
    """The run that ``--resume WHICH`` means, and the checkpoint if it names one.

    ``latest`` is the run in ``runs/`` that was written to last.

    Raises:
        CheckpointError: there is no such run, or no such checkpoint.
    """
    path = Path(which)
    if which == "latest" and not path.exists():
        runs = [folder for folder in root.glob("*") if (folder / "run.json").is_file()]
        if not runs:
            raise CheckpointError(f"there is no run in {root}/ to resume", "name one: `--resume DIR`")
        return RunDir.open(max(runs, key=_last_written)), None
    if not path.name.startswith("step-") and path.name != "best":
        return RunDir.open(path), None
    run_dir = RunDir.open(path.absolute().parent.parent)
    if path.name != "best":
        return run_dir, path.absolute()
    found = checkpoint.best(run_dir.checkpoints)
    if found is None:
        raise CheckpointError(f"{run_dir.path} has no best checkpoint", f"resume its newest: `--resume {run_dir.path}`")
    return run_dir, found


def _last_written(folder: Path) -> float:
    # Appending to a file leaves the folder's own time alone.
    return max(entry.stat().st_mtime for entry in (folder, *folder.iterdir()) if entry.exists())


def read_run_config(run_dir: RunDir) -> dict[str, Any]:
    """The resolved configuration in ``run.json``.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        config: dict[str, Any] = _read_run(run_dir)["config"]
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise CheckpointError(
            f"{run_dir.run_json} is damaged: {failure}", "start a new run from the recipe it was started with"
        ) from None
    return config


def _read_run(run_dir: RunDir) -> Any:
    return json.loads(run_dir.run_json.read_text(encoding="utf-8"))


def describe_run(config: Config, host: PluginHost, weights: Mapping[str, str]) -> dict[str, Any]:
    """What ``run.json`` says: enough to know what ran, and to run it again.

    Args:
        weights: sha256 of the files of the start weights.
    """
    return {
        "schema": RUN_SCHEMA,
        "grpoforge": __version__,
        "config": pin_paths(config).model_dump(mode="json"),
        "weights": dict(weights),
        "plugins": host.provenance(),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device(),
        "threads": torch.get_num_threads(),
        "seed": config.seed,
    }


def pin_paths(config: Config) -> Config:
    """``config`` with absolute paths, so that the run can be resumed from any folder.

    A model of the hub is pinned to the commit that was downloaded: its branch may move on.
    """
    named = {key: getattr(config.data, key) for key in ("dataset", "eval_dataset")}
    data: dict[str, Any] = {key: _absolute(name) for key, name in named.items() if name is not None and is_path(name)}
    # An option of this name is a file or a folder, whatever the dataset.
    if isinstance(file := config.data.options.get("path"), str):
        data["options"] = {**config.data.options, "path": _absolute(file)}
    # A bare name may be an embedded model, whatever folder is called the same here.
    name, revision = config.model.name, config.model.revision
    is_folder = ("/" in name or name.startswith((".", "~"))) and Path(name).expanduser().is_dir()
    model = {"name": _absolute(name)} if is_folder else {"revision": commit_of(name, revision) or revision}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "model": config.model.model_copy(update=model),
            "plugins": [_absolute(file) for file in config.plugins],
            "rewards": [part.model_copy(update=_pinned_reward(part)) for part in config.rewards],
        }
    )


def _pinned_reward(part: RewardPart) -> dict[str, Any]:
    """``./rewards.py:score`` with an absolute path, and so a ``model`` that is a folder; other values as they are."""
    file, _, function = part.name.rpartition(":")
    pinned: dict[str, Any] = {"name": f"{_absolute(file)}:{function}"} if file.endswith(".py") else {}
    model = part.options.get("model")
    if isinstance(model, str) and Path(model).expanduser().is_dir():
        pinned["model"] = _absolute(model)
    return pinned


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def _warn_about_changed_plugins(run_dir: RunDir, host: PluginHost) -> None:
    """A local plugin file that changed since the run began may change the results."""
    try:
        recorded = _read_run(run_dir).get("plugins", [])
    except (OSError, ValueError):
        return
    before = {plugin["name"]: plugin.get("sha256") for plugin in recorded}
    for plugin in host.provenance():
        if plugin["name"] in before and before[plugin["name"]] != plugin["sha256"]:
            logger.warning("plugin `%s` (%s) changed since the run began", plugin["name"], plugin["source"])
