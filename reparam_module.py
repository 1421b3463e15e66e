"""The student as a function of one flat parameter vector, its unrolled training, and the exact gradient of ATT's loss.

Training the student on the synthetic set is unrolled without a graph: only the parameters after each step are kept.
The gradient of the grand loss is then carried backwards one step at a time (the discrete adjoint of SGD), so that its
memory is that of one step, however many were unrolled, and its value is that of automatic differentiation through all
of them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, jvp

from networks import ImageConv2d
from performance import Compiled


def flatten(module: nn.Module) -> Tensor:
    """A copy of a module's parameters as one vector (P,), in the order of `module.parameters()`."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


class FlatModule:
    """A module as a function (theta (P,), x) -> logits, in training mode and without state of its own.

    In its theta the weights of convolutions lie channels last, as convolutions want them: no step rearranges them. `pack`
    brings a vector of `flatten`'s order, an expert's, into this one, and `unpack` back.
    """

    def __init__(self, module: nn.Module):
        self.module = copy.deepcopy(module).train().requires_grad_(False)
        for part in self.module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                # a student has only the statistics of its batch: a running average is no function of theta
                part.track_running_stats, part.running_mean, part.running_var, part.num_batches_tracked = (
                    False, None, None, None,
                )  # fmt: skip
            if isinstance(part, ImageConv2d):
                part.of_patches = True
        parameters = dict(self.module.named_parameters())
        self.names = list(parameters)
        self.shapes = [p.shape for p in parameters.values()]
        self.sizes = [p.numel() for p in parameters.values()]

    def pack(self, vector: Tensor) -> Tensor:
        pieces = (piece.view(shape) for piece, shape in zip(vector.split(self.sizes), self.shapes))
        return torch.cat([(p.permute(0, 2, 3, 1) if p.dim() == 4 else p).reshape(-1) for p in pieces])

    def unpack(self, theta: Tensor) -> Tensor:
        return torch.cat([p.reshape(-1) for p in self.parameters(theta)])

    def parameters(self, theta: Tensor) -> list[Tensor]:
        """Views of theta with the shapes of the module's parameters."""
        return [
            piece.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2) if len(shape) == 4 else piece.view(shape)
            for piece, shape in zip(theta.split(self.sizes), self.shapes)
        ]

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        return functional_call(self.module, dict(zip(self.names, self.parameters(theta))), (x,))


class Student:
    """One SGD step on a batch: the gradient of its loss, and the derivatives of that gradient.

    Pure functions of tensors: theta and v (P,) in the order of `flat.pack`, x (N,C,H,W), y (N,) labels; the loss is the
    mean cross-entropy. With `micro_batch`, a batch is worked off in pieces of so many images, which changes memory and
    not the result; with `compile`, each shape of a piece is compiled once, which changes the result by rounding, and on
    CUDA what is returned lasts until the next call.
    """

    def __init__(self, module: nn.Module, micro_batch: int | None = None, compile: bool = False):
        self.flat = FlatModule(module)
        self.micro_batch = micro_batch
        device = next(module.parameters()).device
        self._gradient, self._second_order = (
            Compiled(function, device) if compile else function for function in (grad(self.loss), self._derivatives)
        )

    def loss(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.flat(theta, x), y)

    def gradient(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """g = dloss/dtheta, (P,)."""
        pieces = self.pieces(x, y)
        if len(pieces) == 1:
            return self._gradient(theta, x, y)
        g = torch.zeros_like(theta)
        for xi, yi in pieces:
            g += self._gradient(theta, xi, yi) * (len(yi) / len(y))
        return g

    def second_order(self, theta: Tensor, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """<g, v>, the Hessian-vector product d<g, v>/dtheta (P,) and d<g, v>/dx (N,C,H,W)."""
        pieces = self.pieces(x, y)
        if len(pieces) == 1:
            return self._second_order(theta, x, y, v)
        gv, hv, dx = torch.zeros_like(theta[0]), torch.zeros_like(theta), torch.empty_like(x)
        done = 0
        for xi, yi in pieces:
            share = len(yi) / len(y)
            gvi, hvi, dxi = self._second_order(theta, xi, yi, v)
            gv += gvi * share
            hv += hvi * share
            torch.mul(dxi, share, out=dx[done : done + len(yi)])
            done += len(yi)
        return gv, hv, dx

    def pieces(self, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = self.micro_batch or len(y)
        return list(zip(x.split(size), y.split(size)))

    def _derivatives(self, theta, x, y, v):
        # <g, v> is the derivative of the loss along v (forward mode); its gradient is one backward pass over that
        def along_v(theta, x):
            return jvp(lambda t: self.loss(t, x, y), (theta,), (v,))[1]

        (hv, dx), gv = grad_and_value(along_v, argnums=(0, 1))(theta, x)
        return gv, hv, dx


@dataclass(frozen=True)
class Minibatch:
    """What one step trains on: which synthetic images, and how the student sees them."""

    indices: Tensor  # (n,) into the synthetic set
    view: Callable | None  # differentiable map of the images, the same at every call; None: as they are

    def see(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of the step; a view that shows an image k times repeats the batch k times."""
        x, y = self.view(images) if self.view else images, labels[self.indices]
        return x, y.repeat(len(x) // len(y))


def draw_indices(count: int, batch: int, steps: int, random: torch.Generator) -> list[Tensor]:
    """Indices of the mini-batches of `steps` steps on a set of `count` images.

    A random permutation is split into chunks of `batch`, taken from the end, so that a smaller last chunk comes first;
    when they are used up, a new permutation is drawn.
    """
    drawn, chunks = [], []
    for _ in range(steps):
        if not chunks:
            chunks = list(torch.randperm(count, generator=random).split(batch))
        drawn.append(chunks.pop())
    return drawn


# distance of two parameter vectors by which the matched step is chosen: the published code's, and the paper's
DISTANCES = {
    "l1": lambda a, b: (a - b).abs_().sum(),
    "l2": lambda a, b: (a - b).square_().sum(),
}


def nearest_step(distances: Tensor) -> int:
    """n = argmin_t of the distances (N_S,) after steps 1..N_S, the later of equals. A student that diverged after some
    step, to nan, is far away there."""
    return len(distances) - int(distances.nan_to_num(nan=float("inf")).flip(0).argmin())


@dataclass(frozen=True)
class Match:
    """One comparison of the student's path with an expert's."""

    grand_loss: float  # ||theta_n - theta*||² / ||theta_0 - theta*||²
    step: int  # the matched step n, 1..N_S
    grad_images: Tensor  # of the grand loss w.r.t. the whole synthetic set
    grad_lr: float  # of the grand loss w.r.t. the synthetic lr


def match_trajectory(
    student: Student,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: float,
    minibatches: list[Minibatch],
    match: str = "att",
    select_dist: str = "l1",
) -> Match:
    """Trains the student on the synthetic set from `start` and matches the step nearest to `target` (Eq. of ATT).

    start, target: expert parameters theta_0 and theta*, (P,); images (M,C,H,W) and labels (M,) the synthetic set; lr
    the synthetic learning rate alpha; one mini-batch a step. `match` "att" takes the step with the smallest
    `select_dist`, "mtt" the last. Keeps (N_S + 1) x P numbers, and otherwise needs the memory of one step.
    """
    start, target = student.flat.pack(start), student.flat.pack(target)
    images = images.detach()
    lr = torch.tensor(lr, dtype=start.dtype, device=start.device)

    # theta_t = theta_{t-1} - alpha g(theta_{t-1}; x_t, y_t). A tensor for each, not rows of one: forward mode gives the
    # whole tensor a tangent, of which only a row is differentiated.
    thetas, distances = [start], []
    for minibatch in minibatches:
        x, y = minibatch.see(images[minibatch.indices], labels)
        g = student.gradient(thetas[-1], x, y)
        thetas.append(torch.addcmul(thetas[-1], g, lr, value=-1))
        distances.append(DISTANCES[select_dist](thetas[-1], target))
    n = nearest_step(torch.stack(distances)) if match == "att" else len(minibatches)

    # L = ||theta_n - theta*||² / ||theta_0 - theta*||², and v = dL/dtheta_t, from t = n down to 0
    scale = (start - target).square().sum()
    v = thetas[n] - target
    grand_loss = v.square().sum() / scale
    v *= 2 / scale
    grad_images, grad_lr = torch.zeros_like(images), torch.zeros_like(lr)
    for t in range(n, 0, -1):
        minibatch = minibatches[t - 1]
        chosen = images[minibatch.indices].requires_grad_()
        x, y = minibatch.see(chosen, labels)
        gv, hv, dx = student.second_order(thetas[t - 1], x.detach(), y, v)
        (d_chosen,) = torch.autograd.grad(x, chosen, dx) if minibatch.view else (dx,)
        grad_images.index_add_(0, minibatch.indices, d_chosen * -lr)
        grad_lr -= gv
        v.addcmul_(hv, lr, value=-1)
    return Match(grand_loss.item(), n, grad_images, grad_lr.item())
