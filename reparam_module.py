"""Networks as functions of one flat parameter vector: the training step, its unrolling, and the exact gradient of ATT.

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
from torch.func import functional_call, grad_and_value, jvp

from distributed import ALONE, Group
from networks import BatchNorm, ImageConv2d
from performance import Compute, mapped_largest_tensors, return_free_pages

# --- Flat vectors ----------------------------------------------------------------------------------------------------


def flatten(module: nn.Module) -> Tensor:
    """A copy of a module's parameters as one vector (P,), in the order of `module.parameters()`."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


class FlatModule:
    """A network as a pure function of vectors: theta (P,), its parameters, and statistics (S,), the running means and
    variances of its batch norms (S = 0 without any). The module only says what is computed: it may be on the meta device.

    In theta the weights of convolutions lie channels last, as convolutions want them: no step rearranges them. `pack`
    brings a vector of `flatten`'s order, an expert's, into this one, and `unpack` back.

    As a `student`, whose training is differentiated, its first convolution is one of patches, and its batch norms know the
    statistics of the batch alone: a running average is no function of theta.
    """

    def __init__(self, module: nn.Module, student: bool = False):
        module = copy.deepcopy(module)
        parameters = dict(module.named_parameters())
        self.names, self.shapes = list(parameters), [p.shape for p in parameters.values()]
        self.sizes = [p.numel() for p in parameters.values()]
        if student:
            for part in module.modules():
                if isinstance(part, ImageConv2d):
                    part.of_patches = True
                elif isinstance(part, BatchNorm):
                    part.track_running_stats, part.running_mean, part.running_var = False, None, None
        buffers = {name: buffer for name, buffer in module.named_buffers() if "running" in name}
        self.buffers, self.buffer_sizes = list(buffers), [buffer.numel() for buffer in buffers.values()]
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
        sizes = zip(self.buffers, self.buffer_sizes)
        return torch.cat([like.new_empty(0), *(like.new_full((size,), name.endswith("var")) for name, size in sizes)])

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
        return dict(zip(self.names + self.buffers, [*self.parameters(theta), *statistics.split(self.buffer_sizes)]))


# --- One step --------------------------------------------------------------------------------------------------------


class Step:
    """One step of SGD on the mean cross-entropy of a batch, as a pure function of flat vectors, and its derivatives:

        g = dloss/dtheta(theta; x, y) + weight_decay * theta
        momentum' = mu * momentum + g
        theta' = theta - lr * momentum'

    theta, momentum, v (P,); statistics (S,), which move on as torch's do; x (N,C,H,W), y (N,) labels or (N, classes)
    probabilities; lr 0-dim. With `micro_batch`, a batch is processed in chunks of so many images, which changes memory and
    not the result. The processes of `group` call a method with the same arguments, and each computes its share of the batch.
    """

    def __init__(
        self, flat: FlatModule, compute=Compute(precision="fp32"), mu=0.0, weight_decay=0.0, micro_batch: int | None = None,
        group: Group = ALONE,
    ):  # fmt: skip
        self.flat, self.compute, self.mu, self.weight_decay, self.micro_batch = flat, compute, mu, weight_decay, micro_batch
        self.group = group
        self._step, self._update = compute(self._sgd, state=3), compute(self._descend, state=2)
        self._gradient, self._second_order = compute(self._differentiate), compute(self._differentiate_twice)

    def __call__(self, theta, momentum, statistics, x, y, lr) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """theta', momentum', statistics' and the loss at theta."""
        if self._fits(y):
            return self._step(theta, momentum, statistics, x, y, lr)
        g, statistics, loss = self.gradient(theta, statistics, x, y)
        return *self._update(theta, momentum, g, lr), statistics, loss

    def gradient(self, theta, statistics, x, y) -> tuple[Tensor, Tensor, Tensor]:
        """dloss/dtheta (P,), statistics' and the loss."""
        if self._fits(y):
            return self._gradient(theta, statistics, x, y)
        sums = theta.new_zeros(len(theta) + 1)  # in one vector: one message
        g, loss = sums[:-1], sums[-1]
        for share, part in self._chunks(y):
            gi, statistics, loss_i = self._gradient(theta, statistics, x[part], y[part])
            g += gi * share
            loss += loss_i * share
        self.group.sum_(sums)
        return g, statistics, loss

    def second_order(self, theta, statistics, x, y, v) -> tuple[Tensor, Tensor, Tensor]:
        """With g = dloss/dtheta: <g, v>, the Hessian-vector product d<g, v>/dtheta (P,) and d<g, v>/dx (N,C,H,W), of which
        each process of the group has its own share, and zeros elsewhere."""
        if self._fits(y):
            return self._second_order(theta, statistics, x, y, v)
        sums, dx = theta.new_zeros(len(theta) + 1), torch.zeros_like(x)
        hv, gv = sums[:-1], sums[-1]
        for share, part in self._chunks(y):
            gvi, hvi, dxi = self._second_order(theta, statistics, x[part], y[part], v)
            gv += gvi * share
            hv += hvi * share
            torch.mul(dxi, share, out=dx[part])
        self.group.sum_(sums)
        return gv, hv, dx

    def _fits(self, y) -> bool:
        return self.group.count == 1 and len(y) <= (self.micro_batch or len(y))

    def _chunks(self, y):
        """Of this process: the share of the batch that a chunk is, and where it lies."""
        own, size = self.group.share(len(y)), self.micro_batch or len(y)
        for start in range(own.start, own.stop, size):
            stop = min(start + size, own.stop)
            yield (stop - start) / len(y), slice(start, stop)

    # what is computed, as pure functions of tensors

    def _loss(self, theta, statistics, x, y):
        logits, statistics = self.flat.train(theta, statistics, x)
        return F.cross_entropy(logits, y), statistics

    def _differentiate(self, theta, statistics, x, y):
        g, (loss, statistics) = grad_and_value(self._loss, has_aux=True)(theta, statistics, x, y)
        return g, statistics, loss

    def _differentiate_twice(self, theta, statistics, x, y, v):
        # <g, v> is the derivative of the loss along v (forward mode); its gradient is one backward pass over that
        def along_v(theta, x):
            return jvp(lambda t: self._loss(t, statistics, x, y)[0], (theta,), (v,))[1]

        (hv, dx), gv = grad_and_value(along_v, argnums=(0, 1))(theta, x)
        return gv, hv, dx

    def _descend(self, theta, momentum, g, lr):
        momentum = self.mu * momentum + (g + self.weight_decay * theta)
        return theta - lr * momentum, momentum

    def _sgd(self, theta, momentum, statistics, x, y, lr):
        g, statistics, loss = self._differentiate(theta, statistics, x, y)
        return *self._descend(theta, momentum, g, lr), statistics, loss


# --- Many steps ------------------------------------------------------------------------------------------------------


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
DISTANCES = {"l1": lambda a, b: (a - b).abs_().sum(), "l2": lambda a, b: (a - b).square_().sum()}


def nearest_step(distances: Tensor) -> int:
    """n = argmin_t of the distances (N_S,) after steps 1..N_S, the later of equals. A nan distance, of a student that
    diverged, counts as infinite."""
    return len(distances) - int(distances.nan_to_num(nan=float("inf")).flip(0).argmin())


@dataclass(frozen=True)
class Match:
    """One comparison of the student's path with an expert's, or the mean of several."""

    grand_loss: float  # ||theta_n - theta*||² / ||theta_0 - theta*||²
    step: float  # the matched step n, 1..N_S
    grad_images: Tensor  # of the grand loss w.r.t. the whole synthetic set
    grad_lr: float  # of the grand loss w.r.t. the synthetic lr


TIDY_EVERY = 20  # eager steps, after which the CPU's heap gives back what lies free between tensors


@mapped_largest_tensors()
def match_trajectory(
    student: Step, start: Tensor, target: Tensor, images: Tensor, labels: Tensor, lr: float, minibatches: list[Minibatch],
    match: str = "att", select_dist: str = "l1",
) -> Match:  # fmt: skip
    """Trains the student on the synthetic set from `start` and matches the step nearest to `target` (Eq. of ATT).

    start, target: expert parameters theta_0 and theta*, (P,); images (M,C,H,W) and labels (M,) the synthetic set; lr
    the synthetic learning rate alpha; one mini-batch a step. `match` "att" takes the step with the smallest
    `select_dist`, "mtt" the last. Keeps (N_S + 1) x P numbers, and otherwise needs the memory of one step. The processes of
    the student's group divide each batch, and have the same result.
    """
    target = student.flat.pack(target)
    images = images.detach()
    lr = torch.tensor(lr, dtype=start.dtype, device=start.device)
    # What outlives a step is allocated before the first one: between steps it would pin holes in the CPU's heap. A
    # tensor for each theta_t, not rows of one: forward mode gives the whole tensor a tangent, of which only a row is
    # differentiated.
    thetas = [student.flat.pack(start), *(torch.empty_like(start) for _ in minibatches)]
    none = start.new_empty(0)  # statistics, of which a student has none
    distances = start.new_empty(len(minibatches))
    grad_images, grad_lr, v = torch.zeros_like(images), torch.zeros_like(lr), torch.empty_like(start)

    leaves_holes = start.device.type == "cpu" and not student.compute.compile  # compiled, a step makes too few tensors

    def tidy(t):
        if leaves_holes and t % TIDY_EVERY == 0:
            return_free_pages()

    def step_forward(t, indices, view):
        """theta_t = theta_{t-1} - alpha g(theta_{t-1}; x_t, y_t)"""
        x, y = view(images[indices], labels[indices])
        g, *_ = student.gradient(thetas[t - 1], none, x, y)
        torch.addcmul(thetas[t - 1], g, lr, value=-1, out=thetas[t])
        distances[t - 1] = DISTANCES[select_dist](thetas[t], target)
        tidy(t)

    def step_back(t, indices, view):
        """From v = dL/dtheta_t: dL/dalpha -= <g, v>, dL/dx_t = -alpha d<g, v>/dx, and dL/dtheta_{t-1}"""
        chosen = images[indices].requires_grad_()
        x, y = view(chosen, labels[indices])
        gv, hv, dx = student.second_order(thetas[t - 1], none, x.detach(), y, v)
        (d_chosen,) = torch.autograd.grad(x, chosen, dx)
        grad_images.index_add_(0, indices, d_chosen * -lr)
        grad_lr.sub_(gv)
        v.addcmul_(hv, lr, value=-1)
        tidy(t)

    for t, minibatch in enumerate(minibatches, 1):
        step_forward(t, minibatch.indices, minibatch.view)
    student.group.from_main_(distances)  # unlike machines may round a sum differently, and see another step nearest
    n = nearest_step(distances) if match == "att" else len(minibatches)

    # L = ||theta_n - theta*||² / ||theta_0 - theta*||², and its derivative by theta_n
    scale = (thetas[0] - target).square().sum()
    torch.sub(thetas[n], target, out=v)
    grand_loss = v.square().sum() / scale
    v *= 2 / scale
    for t in range(n, 0, -1):
        step_back(t, minibatches[t - 1].indices, minibatches[t - 1].view)
    student.group.sum_(grad_images)
    return Match(grand_loss.item(), n, grad_images, grad_lr.item())


def mean_match(matches: list[Match], count: int, images: Tensor, group: Group) -> Match:
    """The mean of `count` matches that the processes of `group` have between them; `images` is the synthetic set."""
    if count == group.count == 1:
        return matches[0]
    sums = torch.zeros(images.numel() + 3, dtype=images.dtype, device=images.device)  # in one vector: one message
    for match in matches:
        sums += torch.cat([match.grad_images.flatten(), sums.new_tensor([match.grad_lr, match.grand_loss, match.step])])
    group.sum_(sums)
    sums /= count
    grad_lr, grand_loss, step = sums[-3:].tolist()
    return Match(grand_loss, step, sums[:-3].view_as(images), grad_lr)
