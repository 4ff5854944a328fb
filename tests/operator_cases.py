"""Operators of torch as functions of one real array: OPERATORS has name -> (function, shape of its
argument).

The first group is what potentials are made of (`make test`); the others complete the table (`make
test-all`). Each operator is made curved enough that its second derivatives show, and its result is
weighted so that no symmetry hides an error.
"""

from functools import partial

import torch
from torch import linalg, special
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def weighted(f):
    """The results of f, flat, with a weight for each entry."""

    def g(x):
        ys = f(x)
        ys = ys if isinstance(ys, tuple | list) else (ys,)
        flat = torch.cat([(y.abs() if y.is_complex() else y).flatten() for y in ys])
        return flat * torch.cos(torch.arange(len(flat), dtype=flat.dtype) + 1)

    return g


def positive(x):
    return x.square() + 0.3


def inside(x):
    """Within (-0.4, 0.4)."""
    return 0.4 * torch.tanh(x)


def symmetric(a):
    return a + a.mT + torch.diag(torch.arange(len(a), dtype=a.dtype))


def definite(a):
    return a @ a.mT + torch.eye(len(a), dtype=a.dtype)


def counted(x):
    """Rows of x by INDEX, each with a number added: no two are alike."""
    return x[INDEX] + torch.arange(5, dtype=x.dtype)[:, None]


def attention(x):
    """By torch's formula: its fused kernels have a first backward alone, which newer versions take
    for so few rows."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(x[None], 2 * x[None], x[None] ** 2)


def of(module, names, argument=lambda x: x):
    """{name: module.name of the argument}"""
    return {n: lambda x, f=getattr(module, n): f(argument(x)) for n in names.split()}


INDEX = torch.tensor([0, 1, 0, 1, 1])
WIDE = INDEX[:, None].expand(5, 3)
CLASSES = torch.tensor([0, 2])

POTENTIALS = {
    **of(torch, "sin cos exp expm1 tanh sigmoid erf erfc square abs"),
    **of(torch, "log log1p sqrt rsqrt reciprocal", positive),
    **of(torch, "asin acos atanh", inside),
    **of(F, "relu silu gelu mish elu celu selu softplus logsigmoid hardswish leaky_relu"),
    "pow": lambda x: x**3,
    "pow of a tensor": lambda x: positive(x) ** x,
    "div": lambda x: x.sin() / positive(x),
    "atan2": lambda x: torch.atan2(x, positive(x)),
    "where": lambda x: torch.where(x > 0, x.sin(), x**2),
    "clamp": lambda x: x.clamp(-0.8, 0.8) ** 2,
    "logit": lambda x: torch.logit(torch.sigmoid(x)),
    "sum": lambda x: x.sum(0) ** 2,
    "prod": lambda x: x.prod(1),
    "norm": lambda x: x.norm(dim=-1),
    "vector_norm": lambda x: linalg.vector_norm(x, dim=-1),
    "logsumexp": lambda x: x.logsumexp(1),
    "softmax": lambda x: x.softmax(1),
    "cumsum": lambda x: x.cumsum(1) ** 2,
    "normalize": lambda x: F.normalize(x, dim=1),
    "index": lambda x: x[:, [0, 2, 2]] ** 2,
    "index_select": lambda x: x.index_select(0, INDEX) ** 2,
    "index_add": lambda x: x.new_zeros(2, 3).index_add(0, INDEX, x[INDEX] ** 2),
    "scatter_add": lambda x: x.new_zeros(2, 3).scatter_add(0, WIDE, x[INDEX] ** 3),
    "scatter mean": lambda x: x.new_zeros(2, 3).scatter_reduce(0, WIDE, x[INDEX] ** 2, "mean"),
    "scatter prod": lambda x: x.new_ones(2, 3).scatter_reduce(0, WIDE, counted(x), "prod"),
    "gather": lambda x: x.gather(0, WIDE) ** 2,
    "matmul": lambda x: x @ x.mT,
    "einsum": lambda x: torch.einsum("ij,kj,il->kl", x, x, x),
    "bmm": lambda x: torch.bmm(x[None], x.mT[None]),
    "cross": lambda x: linalg.cross(x[0], x[1]),
    "linear": lambda x: F.linear(x, x, x[0, :2]),
    "bilinear": lambda x: F.bilinear(x, x, torch.ones(2, 3, 3, dtype=x.dtype)),
    "cosine_similarity": lambda x: F.cosine_similarity(x[:1], x[1:]),
    "attention": attention,
    "layer_norm": lambda x: F.layer_norm(x, (3,)),
    "group_norm": lambda x: F.group_norm(
        x[None].repeat(1, 2, 1) * torch.arange(1, 5, dtype=x.dtype)[:, None], 2
    ),
    "huber": lambda x: F.huber_loss(x, x**2, delta=0.3),
    "smooth_l1": lambda x: F.smooth_l1_loss(x, x**2, beta=0.3),
    "fft": lambda x: torch.fft.fft(x).abs() ** 2,
    "det": torch.det,
    "volume": lambda a: torch.det(a).abs(),
    "slogdet": lambda a: linalg.slogdet(a)[1],
    "logdet": lambda a: torch.logdet(definite(a)),
    "inv": torch.inverse,
    "solve": lambda a: linalg.solve(a, a[0]),
    "solve a matrix": lambda a: linalg.solve(a, a.mT),
    "solve from the right": lambda a: linalg.solve(a, a.mT, left=False),
    "cholesky": lambda a: linalg.cholesky(definite(a)),
    "eigvalsh": lambda a: linalg.eigvalsh(symmetric(a)),
    "eigh": lambda a: linalg.eigh(symmetric(a))[1] ** 2,
    "svdvals": linalg.svdvals,
    "qr": linalg.qr,
    "matrix_exp": torch.matrix_exp,
    "pinv": linalg.pinv,
    "polar decomposition": lambda a: (lambda u, _, vh: u @ vh)(*linalg.svd(a)),
}
OTHERS = {
    **of(torch, "tan sinh cosh asinh atan sinc neg i0"),
    **of(torch, "log2 lgamma digamma", positive),
    **of(torch, "erfinv", inside),
    **of(F, "softsign tanhshrink relu6 softshrink hardshrink hardtanh"),
    **of(special, "i0e i1 i1e ndtr log_ndtr erfcx"),
    "acosh": lambda x: torch.acosh(1.2 + positive(x)),
    "entr": lambda x: special.entr(positive(x)),
    "logit eps": lambda x: torch.logit(torch.sigmoid(x), eps=1e-3),
    "gelu tanh": partial(F.gelu, approximate="tanh"),
    "pow float": lambda x: positive(x) ** 1.7,
    "hypot": lambda x: torch.hypot(x, positive(x)),
    "xlogy": lambda x: torch.xlogy(x, positive(x)),
    "maximum": lambda x: torch.maximum(x.sin(), x**2),
    "lerp": lambda x: torch.lerp(x.sin(), x**2, x),
    "addcmul": lambda x: torch.addcmul(x, x.sin(), x.cos()),
    "addcdiv": lambda x: torch.addcdiv(x, x.sin(), positive(x)),
    "fmod": lambda x: torch.fmod(x, 0.7) * x,
    "remainder": lambda x: torch.remainder(x, 0.7) * x,
    "polygamma": lambda x: torch.polygamma(1, positive(x)),
    "prelu": lambda x: F.prelu(x, x[0, :1] ** 2),
    "glu": lambda x: F.glu(x.reshape(3, 2)),
    "threshold": lambda x: F.threshold(x, 0.1, 0.0) ** 2,
    "copysign": lambda x: torch.copysign(x**2, x),
    "logaddexp": lambda x: torch.logaddexp(x, x**2),
    "mean": lambda x: x.mean(1) ** 2,
    "prod of all": torch.prod,
    "var": lambda x: x.var(1),
    "std": lambda x: x.std(1),
    "norm of order 1": lambda x: linalg.vector_norm(x, ord=1, dim=-1) ** 2,
    "norm of order 3": lambda x: linalg.vector_norm(x, ord=3, dim=-1),
    "norm of order inf": lambda x: linalg.vector_norm(x, ord=float("inf"), dim=-1) ** 2,
    "log_softmax": lambda x: x.log_softmax(1),
    "cumprod": lambda x: x.cumprod(1),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "amax": lambda x: x.amax(1) ** 2,
    "median": lambda x: x.median(1).values ** 2,
    "sort": lambda x: x.sort(1).values ** 2,
    "topk": lambda x: x.topk(2).values ** 2,
    "renorm": lambda x: torch.renorm(x, 2, 0, 0.5),
    "dist": lambda x: torch.dist(x[0], x[1]),
    "quantile": lambda x: x.quantile(0.3) ** 2,
    "trapezoid": lambda x: torch.trapezoid(x**2),
    "index_put": lambda x: x.new_zeros(2, 3).index_put((INDEX,), x[INDEX] ** 2, accumulate=True),
    "scatter sum": lambda x: x.new_zeros(2, 3).scatter_reduce(0, WIDE, x[INDEX] ** 2, "sum"),
    "scatter amax": lambda x: x.new_zeros(2, 3).scatter_reduce(0, WIDE, counted(x) ** 2, "amax"),
    "index_reduce prod": lambda x: x.new_ones(2, 3).index_reduce(0, INDEX, counted(x), "prod"),
    "segment_reduce": lambda x: torch.segment_reduce(
        x.flatten() ** 2, "sum", lengths=torch.tensor([2, 4])
    ),
    "masked_fill": lambda x: x.masked_fill(torch.tensor([True, False, False]), 1.0) ** 2,
    "roll": lambda x: x.roll(1, 1) * x,
    "pad": lambda x: F.pad(x[None], (1, 1), mode="reflect") ** 2,
    "tril": lambda x: x.tril() ** 2,
    "unfold": lambda x: x.unfold(1, 2, 1) ** 2,
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0) ** 2,
    "cat": lambda x: torch.cat([x, x**2]) ** 2,
    "kron": lambda x: torch.kron(x, x),
    "embedding": lambda x: F.embedding(INDEX, x) ** 2,
    "take_along_dim": lambda x: torch.take_along_dim(x, x.argsort(1), 1) ** 2,
    "baddbmm": lambda x: torch.baddbmm(x.new_ones(1, 2, 2), x[None], x.mT[None]),
    "addmm": lambda x: torch.addmm(x @ x.mT, x, x.mT),
    "tensordot": lambda x: torch.tensordot(x, x, ([1], [1])),
    "cdist": lambda x: torch.cdist(x, x.roll(1, 1)),
    "pdist": lambda x: F.pdist(torch.cat([x, 2 * x])),
    "pairwise_distance": lambda x: F.pairwise_distance(x[:1], x[1:]),
    "conv1d": lambda x: F.conv1d(x[None], x[None, :, :2]),
    "conv2d": lambda x: F.conv2d(x[None, None], x[None, None, :, :2]),
    "conv_transpose1d": lambda x: F.conv_transpose1d(x[None], x[:, None, :2]),
    "instance_norm": lambda x: F.instance_norm(x[None]),
    "batch_norm": lambda x: F.batch_norm(torch.cat([x, x**2]), None, None, training=True),
    "rms_norm": lambda x: F.rms_norm(x, (3,)),
    "mse": lambda x: F.mse_loss(x, x**2),
    "l1": lambda x: F.l1_loss(x, x**2),
    "kl_div": lambda x: F.kl_div(x.log_softmax(1), x.softmax(1)),
    "bce with logits": lambda x: F.binary_cross_entropy_with_logits(x, torch.sigmoid(x)),
    "cross_entropy": lambda x: F.cross_entropy(x, CLASSES),
    "poisson_nll": lambda x: F.poisson_nll_loss(x, positive(x)),
    "soft_margin": lambda x: F.soft_margin_loss(x, torch.ones_like(x)),
    "multi_margin": lambda x: F.multi_margin_loss(x, CLASSES) ** 2,
    "triplet": lambda x: F.triplet_margin_loss(x, x**2, x.sin()),
    "max_pool": lambda x: F.max_pool1d(x[None], 2) ** 2,
    "avg_pool": lambda x: F.avg_pool1d(x[None], 2) ** 2,
    "interpolate": lambda x: F.interpolate(x[None, None], size=(4, 5), mode="bicubic") ** 2,
    "grid_sample": lambda x: F.grid_sample(
        x[None, None], torch.tanh(x).reshape(1, 1, 3, 2) / 2, align_corners=True
    ),
    "lstm_cell": lambda x: torch.lstm_cell(
        x, (x[:, :1], x[:, :1]), x.new_ones(4, 3), x.new_ones(4, 1)
    ),
    "gru_cell": lambda x: torch.gru_cell(x, x[:, :1], x.new_ones(3, 3), x.new_ones(3, 1)),
    "rfft": lambda x: torch.fft.rfft(x).abs() ** 2,
    "complex": lambda x: torch.view_as_real(torch.complex(x, x**2) ** 2),
    "polar": lambda x: torch.polar(positive(x), x).real,
    "angle": lambda x: torch.view_as_complex(x.reshape(3, 2)).angle(),
    "hardsigmoid": lambda x: F.hardsigmoid(x) ** 2,
    "cholesky_solve": lambda a: torch.cholesky_solve(a, linalg.cholesky(definite(a))),
    "cholesky_inverse": lambda a: torch.cholesky_inverse(linalg.cholesky(definite(a))),
    "solve_triangular": lambda a: linalg.solve_triangular(
        a.triu() + 2 * torch.eye(3, dtype=a.dtype), a, upper=True
    ),
    "lu": lambda a: linalg.lu(a)[1:],
    "lu_solve": lambda a: linalg.lu_solve(*linalg.lu_factor(a), a.mT),
    "inv_ex": lambda a: linalg.inv_ex(a)[0],
    "pinv hermitian": lambda a: linalg.pinv(definite(a), hermitian=True),
    "matrix_power": lambda a: linalg.matrix_power(a, -2),
    "matrix_norm": linalg.matrix_norm,
    "matrix_norm of order 2": lambda a: linalg.matrix_norm(a, 2),
    "nuclear norm": lambda a: linalg.matrix_norm(a, "nuc"),
    "eigvals": lambda a: linalg.eigvals(a).real.sum() ** 2,
    "householder_product": lambda a: linalg.householder_product(a, a[0]),
    "tensorsolve": lambda a: linalg.tensorsolve(a, a[0]),
}
_SQUARE = {"det", "householder_product", "matrix_exp"}
for _name in (
    "volume",
    "inv",
    "logdet",
    "cholesky",
    "eig",
    "svd",
    "qr",
    "solve",
    "pinv",
    "polar d",
    "lu",
    "matrix_",
    "nuclear",
    "tensorsolve",
    "slogdet",
):
    _SQUARE |= {n for n in POTENTIALS | OTHERS if n.startswith(_name)}


def case(name):
    """(weighted function, shape of its argument)"""
    return weighted((POTENTIALS | OTHERS)[name]), (3, 3) if name in _SQUARE else (2, 3)


# What torch has no second derivative of: an error says so.
ONCE = {"cdist", "pdist", "segment_reduce", "multi_margin", "hardsigmoid"}
# What torch.func.vmap can't batch a derivative of: an error names derivatives="autograd" (of prelu,
# torch's own about shapes).
UNBATCHED = {
    "scatter prod",
    "index_reduce prod",
    "grid_sample",
    "lstm_cell",
    "prelu",
    "segment_reduce",
}
# Double backward, differentiated in its cotangent as derivatives="autograd" serves forward mode, is
# NaN in torch itself.
NOT_FORWARD = {"logcumsumexp"}
