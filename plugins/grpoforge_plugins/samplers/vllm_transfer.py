"""Weights from the trainer's GPU to a server's GPUs by NCCL, through the trainer side of vLLM's weight transfer."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from grpoforge.errors import ConfigError, RunFailed, first_line
from grpoforge.types import PolicyView
from grpoforge_plugins.samplers.vllm_http import GO_ON, Server
from grpoforge_plugins.samplers.vllm_weights import original_weights


def nccl_sender(server: Server, policy: PolicyView) -> Callable[[PolicyView], None]:
    """What sends a policy's present weights to ``server`` each time it is called; ``policy`` says what they look like.

    The group that carries them, this process and the server's workers, is made here, once.

    Raises:
        ConfigError: vLLM is not installed here, or in another version than the server's.
        RunFailed: the group could not be made.
    """
    _require_same_version(server)
    from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    host = _own_address(server.url)
    info = NCCLTrainerInitInfo(
        rank=0,
        master_address=host,
        master_port=_free_port(host),
        world_size=1 + server.get_field("/get_world_size", "world_size"),
    )
    client, source = HTTPVLLMWeightSyncClient(server.url, timeout=server.timeout), weight_source(policy)
    try:
        engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
    except Exception as failure:  # the boundary: NCCL, torch and HTTP all raise their own
        raise _failed(server, failure) from failure

    def send(policy: PolicyView) -> None:
        source.policy = policy
        try:
            engine.send_weights()
        except Exception as failure:  # the boundary: as above
            raise _failed(server, failure) from failure

    return send


def weight_source(policy: PolicyView) -> Any:
    """The weights as vLLM's trainer side wants them: described, and then passed through, at every round.

    They are those of the attribute ``policy``, at first the given one.
    """
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    class PolicyWeights(WeightSource):  # type: ignore[misc]
        def __init__(self, policy: PolicyView) -> None:
            self.policy = policy

        def metadata(self) -> list[Any]:
            weights = original_weights(self.policy)
            return [ParamMeta(name, one.dtype, tuple(one.shape)) for name, one in weights.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            yield from original_weights(self.policy).items()

    return PolicyWeights(policy)


def _require_same_version(server: Server) -> None:
    theirs = server.get_field("/version", "version")
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"NCCL weight transfer to {server.url} needs vLLM in this environment too, and it is not installed",
            f"`pip install vllm=={theirs}`, or choose `sync: reload`",
        )
    import vllm

    if vllm.__version__ != theirs:
        raise ConfigError(
            f"the vLLM server {server.url} is version {theirs}, and {vllm.__version__} is installed here",
            "NCCL weight transfer needs one version on both sides; install it, or choose `sync: reload`",
        )


def _failed(server: Server, failure: Exception) -> RunFailed:
    return RunFailed(
        f"NCCL weight transfer to the vLLM server {server.url} failed: {type(failure).__name__}: {first_line(failure)}",
        f"the trainer and the server need GPUs of their own that reach each other; {GO_ON}, or choose `sync: reload`",
    )


def _own_address(url: str) -> str:
    """The address of this machine as the server sees it."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent: connecting chooses a route
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))
        return str(probe.getsockname()[0])


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
