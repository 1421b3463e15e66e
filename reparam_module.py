"""Networks as functions of one flat parameter vector: the training step, its unrolling, and the exact gradient of ATT.

Training the student on the synthetic set is unrolled without a graph: only the parameters after each step are kept.
The gradient of the grand loss is then carried backwards one step at a time (the discrete adjoint of SGD), so that its
memory is that of one step, however many were unrolled, and its value is that of automatic differentiation through all
of them.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad_and_value, jvp

from networks import BatchNorm, ImageConv2d
from performance import Compute

# ---------------------------------------------------------------------------------------------------------------------
# Flat vectors


def flatten(module: nn.Module) -> Tensor:
    """A copy of a module's parameters as one vector (P,), in the order of `module.parameters()`."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


class FlatModule:
    """A network as a pure function of vectors: theta (P,), its parameters, and statistics (S,), the running means and
    variances of its batch norms (S = 0 without any). The module itself only says what is computed, and may be on the
    meta device.

    In theta the weights of convolutions lie channels last, as convolutions want them: no step rearranges them. `pack`
    brings a vector of `flatten`'s order, an expert's, into this one, and `unpack` back.
    """

    def __init__(self, module: nn.Module, track_statistics: bool = True):
        module = copy.deepcopy(module)
        parameters = dict(module.named_parameters())
        self.names = list(parameters)
        self.shapes = [p.shape for p in parameters.values()]
        self.sizes = [p.numel() for p in parameters.values()]
        norms = {name: part for name, part in module.named_modules() if isinstance(part, BatchNorm)}
        if not track_statistics:
            for part in norms.values():
                part.track_running_stats, part.running_mean, part.running_var = False, None, None
            norms = {}
        self.buffers = [f"{name}.running_{which}" for name in norms for which in ("mean", "var")]
        self.buffer_sizes = [part.num_features for part in norms.values() for _ in ("mean", "var")]
        self.training, self.testing = module.train(), copy.deepcopy(module).eval()

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

    def initial_statistics(self, like: Tensor) -> Tensor:
        """Means 0 and variances 1, of the type and on the device of `like`."""
        values = [name.endswith("var") for name in self.buffers]
        return torch.cat([like.new_empty(0), *(like.new_full((size,), v) for v, size in zip(values, self.buffer_sizes))])

    def train(self, theta: Tensor, statistics: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) in training mode, and the statistics after it."""
        tensors = self._tensors(theta, statistics)
        logits = functional_call(self.training, tensors, (x,))
        # what a forward pass assigns to a buffer, functional_call writes back into the dict
        return logits, torch.cat([tensors[name] for name in self.buffers]) if self.buffers else statistics

    def test(self, theta: Tensor, statistics: Tensor, x: Tensor) -> Tensor:
        """Logits (N, classes) in evaluation mode, by the running statistics."""
        return functional_call(self.testing, self._tensors(theta, statistics), (x,))

    def _tensors(self, theta: Tensor, statistics: Tensor) -> dict[str, Tensor]:
        parameters, buffers = zip(self.names, self.parameters(theta)), zip(self.buffers, statistics.split(self.buffer_sizes))
        return dict([*parameters, *buffers])


# ---------------------------------------------------------------------------------------------------------------------
# One step


class Step:
    """One step of SGD on the mean cross-entropy of a batch, as a pure function of flat vectors:

        g = dloss/dtheta(theta; x, y) + weight_decay * theta
        momentum' = mu * momentum + g
        theta' = theta - lr * momentum'

    theta, momentum (P,); statistics (S,); x (N,C,H,W), y (N,) labels; lr 0-dim. Batch norm's statistics move on as
    torch's do. With `micro_batch`, a batch is processed in chunks of so many images, which changes memory and not the
    result.
    """

    def __init__(
        self, flat: FlatModule, compute: Compute, mu: float = 0.0, weight_decay: float = 0.0, micro_batch: int | None = None
    ):
        self.flat, self.mu, self.weight_decay, self.micro_batch = flat, mu, weight_decay, micro_batch
        self._step = compute(self._whole, state=3)
        self._gradient, self._update = compute(self.gradient), compute(self.update, state=2)

    def __call__(self, theta, momentum, statistics, x, y, lr) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """theta', momentum', statistics' and the loss at theta."""
        if not self.micro_batch or len(y) <= self.micro_batch:
            return self._step(theta, momentum, statistics, x, y, lr)
        g, loss = torch.zeros_like(theta), torch.zeros_like(lr)
        for share, xi, yi in chunks(self.micro_batch, x, y):
            gi, statistics, loss_i = self._gradient(theta, statistics, xi, yi)
            g += gi * share
            loss += loss_i * share
        return *self._update(theta, momentum, g, lr), statistics, loss

    def gradient(self, theta, statistics, x, y):
        def loss(theta):
            logits, after = self.flat.train(theta, statistics, x)
            return F.cross_entropy(logits, y), after

        g, (value, after) = grad_and_value(loss, has_aux=True)(theta)
        return g, after, value

    def update(self, theta, momentum, g, lr):
        momentum = self.mu * momentum + (g + self.weight_decay * theta)
        return theta - lr * momentum, momentum

    def _whole(self, theta, momentum, statistics, x, y, lr):
        g, statistics, loss = self.gradient(theta, statistics, x, y)
        return *self.update(theta, momentum, g, lr), statistics, loss


def chunks(size: int, x: Tensor, y: Tensor) -> Iterator[tuple[float, Tensor, Tensor]]:
    """A batch in chunks of up to `size` images, each with its share of the batch."""
    for xi, yi in zip(x.split(size), y.split(size)):
        yield len(yi) / len(y), xi, yi


class Student:
    """A network whose training on synthetic images is unrolled and differentiated: the gradient of a step, and the
    derivatives of that gradient.

    Pure functions of tensors: theta and v (P,) in the order of `flat.pack`, x (N,C,H,W), y (N,) labels. Batch norm uses
    the statistics of the batch alone: a running average is no function of theta. `micro_batch` as in `Step`.
    """

    def __init__(self, module: nn.Module, micro_batch: int | None = None, compute: Compute = Compute(precision="fp32")):
        self.flat = FlatModule(module, track_statistics=False)
        for part in self.flat.training.modules():
            if isinstance(part, ImageConv2d):
                part.of_patches = True
        self.micro_batch = micro_batch
        self._gradient, self._second_order = compute(grad_and_value(self.loss)), compute(self._derivatives)

    def loss(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        logits, _ = self.flat.train(theta, theta.new_empty(0), x)
        return F.cross_entropy(logits, y)

    def gradient(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """g = dloss/dtheta, (P,)."""
        if not self.micro_batch or len(y) <= self.micro_batch:
            return self._gradient(theta, x, y)[0]
        g = torch.zeros_like(theta)
        for share, xi, yi in chunks(self.micro_batch, x, y):
            g += self._gradient(theta, xi, yi)[0] * share
        return g

    def second_order(self, theta: Tensor, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """<g, v>, the Hessian-vector product d<g, v>/dtheta (P,) and d<g, v>/dx (N,C,H,W)."""
        if not self.micro_batch or len(y) <= self.micro_batch:
            return self._second_order(theta, x, y, v)
        gv, hv, dx = torch.zeros_like(theta[0]), torch.zeros_like(theta), torch.empty_like(x)
        done = 0
        for share, xi, yi in chunks(self.micro_batch, x, y):
            gvi, hvi, dxi = self._second_order(theta, xi, yi, v)
            gv += gvi * share
            hv += hvi * share
            torch.mul(dxi, share, out=dx[done : done + len(yi)])
            done += len(yi)
        return gv, hv, dx

    def _derivatives(self, theta, x, y, v):
        # <g, v> is the derivative of the loss along v (forward mode); its gradient is one backward pass over that
        def along_v(theta, x):
            return jvp(lambda t: self.loss(t, x, y), (theta,), (v,))[1]

        (hv, dx), gv = grad_and_value(along_v, argnums=(0, 1))(theta, x)
        return gv, hv, dx


# ---------------------------------------------------------------------------------------------------------------------
# Many steps


@dataclass(frozen=True)
class Minibatch:
    """What one step trains on: which synthetic images, and how the student sees them."""

    indices: Tensor  # (n,) into the synthetic set
    view: Callable  # (x, y) -> (x, y), differentiable in x, the same at every call


def draw_indices(count: int, batch: int, steps: int, random: torch.Generator) -> list[Tensor]:
    """Indices of the mini-batches of `steps` steps on a set of `count` images.

    A random permutation is split into chunks of `batch`, taken from the end, so that a smaller last chunk comes first;
    when they are used up, a new permutation is drawn.
    """
    drawn, left = [], []
    for _ in range(steps):
        if not left:
            left = list(torch.randperm(count, generator=random).split(batch))
        drawn.append(left.pop())
    return drawn


# distance of two parameter vectors by which the matched step is chosen: the published code's, and the paper's
DISTANCES = {
    "l1": lambda a, b: (a - b).abs_().sum(),
    "l2": lambda a, b: (a - b).square_().sum(),
}


def nearest_step(distances: Tensor) -> int:
    """n = argmin_t of the distances (N_S,) after steps 1..N_S, the later of equals. A nan distance, of a student that
    diverged, counts as infinite."""
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
    target = student.flat.pack(target)
    images = images.detach()
    lr = torch.tensor(lr, dtype=start.dtype, device=start.device)
    # What outlives a step is allocated before the first one: between steps it would pin holes in the CPU's heap. A
    # tensor for each theta_t, not rows of one: forward mode gives the whole tensor a tangent, of which only a row is
    # differentiated.
    thetas = [student.flat.pack(start), *(torch.empty_like(start) for _ in minibatches)]
    distances = start.new_empty(len(minibatches))
    grad_images, grad_lr, v = torch.zeros_like(images), torch.zeros_like(lr), torch.empty_like(start)

    # theta_t = theta_{t-1} - alpha g(theta_{t-1}; x_t, y_t)
    for t, minibatch in enumerate(minibatches, 1):
        x, y = minibatch.view(images[minibatch.indices], labels[minibatch.indices])
        torch.addcmul(thetas[t - 1], student.gradient(thetas[t - 1], x, y), lr, value=-1, out=thetas[t])
        distances[t - 1] = DISTANCES[select_dist](thetas[t], target)
    n = nearest_step(distances) if match == "att" else len(minibatches)

    # L = ||theta_n - theta*||² / ||theta_0 - theta*||², and v = dL/dtheta_t, from t = n down to 0
    scale = (thetas[0] - target).square().sum()
    torch.sub(thetas[n], target, out=v)
    grand_loss = v.square().sum() / scale
    v *= 2 / scale
    for t in range(n, 0, -1):
        indices, view = minibatches[t - 1].indices, minibatches[t - 1].view
        chosen = images[indices].requires_grad_()
        x, y = view(chosen, labels[indices])
        gv, hv, dx = student.second_order(thetas[t - 1], x.detach(), y, v)
        (d_chosen,) = torch.autograd.grad(x, chosen, dx)
        grad_images.index_add_(0, indices, d_chosen * -lr)
        grad_lr -= gv
        v.addcmul_(hv, lr, value=-1)
    return Match(grand_loss.item(), n, grad_images, grad_lr.item())
