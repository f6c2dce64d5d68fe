"""What factors have in common that are networks: how they are kept, frozen and counted."""

from typing import Any, ClassVar, Self

from torch import Tensor, nn

from torchem.errors import invalid, wrong_type
from torchem.factors._climbed import Climbed


def checked_size(name: str, size: Any) -> None:
    """Refuse a size that is no positive whole number."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise invalid(name, "a positive whole number", repr(size), "give at least 1")


class Network(Climbed):
    """A factor around a torch module, all of whose parameters are its own.

    The module is kept in evaluation mode, in training too: what it gives must not depend on chance or on other rows.

    Args:
        module: The network.
        instead: What serves where nothing is to be learnt, for the message.

    Raises:
        InvalidType: If it is no torch module.
        InvalidArgument: If it has no parameters.
    """

    called: ClassVar[str] = "a network by itself"

    module: nn.Module

    def __init__(self, module: nn.Module, instead: str):
        super().__init__()
        if not isinstance(module, nn.Module):
            raise wrong_type("module", "a torch module", module, "pass for example a torch.nn.Sequential")
        if not any(value.is_floating_point() for value in module.parameters()):
            raise invalid("module", "a network with parameters", "none", instead)
        self.module = module
        #: Whether the whole network is kept through every M-step.
        self.fixed = False
        module.eval()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.module.eval()
        return self

    def row_size(self) -> int:
        # What each layer gives is kept for the gradient.
        return 2 * sum(len(value) for value in self.parameters() if value.dim() > 1)

    def freeze(self, *names: str, mask: Tensor | None = None) -> Self:
        """Keep the whole network through every M-step.

        Raises:
            InvalidArgument: For names or a mask.
        """
        if names or mask is not None:
            raise invalid(
                "freeze", "no name and no mask, for the whole network", names or "a mask",
                "use requires_grad_(False) for layers that shall stay",
            )  # fmt: skip
        self.fixed = True
        return self

    def unfreeze(self, *names: str) -> Self:
        """Let M-steps move the network again."""
        self.fixed = False
        return self

    def n_parameters(self) -> int:
        return 0 if self.fixed else sum(value.numel() for value in self.parameters() if value.requires_grad)
