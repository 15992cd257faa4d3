"""The method: a frozen attention plus a sparse combination of learned atoms (Eqs. 8–9, §3.4)."""

import operator

import torch
import torch.nn.functional as F
from torch import nn

from .attention import merge_heads, split_heads
from .common import UserError, checksum, is_number, is_whole
from .kinds import Wrapper, kind_of
from .thresholds import relu_threshold, soft_threshold, top_k

THRESHOLDS = ("top_k", "soft", "relu")
ORDERS = ("before", "after")


class Adapter(nn.Module):
    """The base of all methods: parameters that stay in float32, and results cached until a parameter changes."""

    def __init__(self):
        super().__init__()
        self._memory = None
        self.scale = 1.0  # factor of ΔO; see `set_scale`

    def silent(self):
        """Whether it changes nothing, for every input."""
        return self.scale == 0

    def _apply(self, fn, recurse=True):
        """`model.to(torch.bfloat16)` and the like move an adapter, but do not lower its precision."""

        def precise(value):
            moved = fn(value)
            return value.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        self._memory = None
        return super()._apply(precise, recurse)

    def remembered(self, compute, *tensors):
        """compute(), cached until one of `tensors` is replaced or changed in place (seen by its version counter).

        A change through `tensor.data` is not seen; change the tensor itself, under torch.no_grad().
        """
        versions = [(None if v.is_inference() else v._version, v.dtype, v.device) for v in tensors]
        if self._memory is None or self._memory[1] != versions or any(map(operator.is_not, self._memory[0], tensors)):
            self._memory = tensors, versions, compute()
        return self._memory[2]

    def while_frozen(self, compute, *tensors):
        """compute(), cached while gradients are disabled."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return compute()
        return self.remembered(compute, *tensors)


class SparseAdapter(Adapter):
    """The trained part: W_s (C_i, M), which makes the coefficients S, and D (M, C_o), whose rows are the atoms

        order="before"    S = A σ_λ(X W_s)    what the paper runs (§3.4)
        order="after"     S = σ_λ(A X W_s)    (Eq. 8)

    and ΔO = S D. `density` is the ρ of top-k, `lam` the λ of the soft and relu thresholds. The M atoms are split evenly
    over the heads: A⁽ʰ⁾ mixes the coefficients of head h. top-k chooses among all M coefficients of a token. D starts
    at zero, so a fresh adapter changes nothing. W_s starts at a scale that gives X W_s about unit variance if X is
    layer-normed.

    `keep` (M,) switches atoms on and off; `usage` (M,) is the mean |S_m| of the last measurement (both are set by
    `atoms.py`). UserError for options that do not fit.
    """

    method = "sparse"

    def __init__(self, in_dim, out_dim, heads, *, atoms=256, density=0.02, threshold="top_k", lam=None, order="before"):
        super().__init__()
        if not is_whole(atoms) or atoms < 1 or atoms % heads:
            raise UserError(f"atoms={atoms!r} does not split over {heads} heads; choose a multiple of {heads}")
        if threshold not in THRESHOLDS:
            raise UserError(f"threshold={threshold!r} is unknown; choose one of {', '.join(THRESHOLDS)}")
        if order not in ORDERS:
            raise UserError(f"order={order!r} is unknown; choose one of {', '.join(ORDERS)}")
        if threshold == "top_k" and lam is not None:
            raise UserError(f"lam={lam} has no meaning for top_k, which is set by density; leave lam out")
        if threshold != "top_k" and not (is_number(lam) and lam >= 0):
            raise UserError(f"threshold={threshold!r} with lam={lam!r}; give a lam of 0 or more, like 0.1")
        lam = None if lam is None else float(lam)
        self.heads, self.atoms, self.threshold, self.lam, self.order = heads, int(atoms), threshold, lam, order
        self.set_density(density)
        self.W_s = nn.Parameter(torch.randn(in_dim, atoms) / in_dim**0.5)  # (C_i, M)
        self.D = nn.Parameter(torch.zeros(atoms, out_dim))  # (M, C_o)
        self.register_buffer("usage", torch.zeros(atoms))  # (M,)
        self.measured_with = None  # usage_depends_on() at the last measurement
        self.register_buffer("keep", torch.ones(atoms, dtype=torch.bool), persistent=False)  # (M,)

    def set_density(self, density):
        """Set ρ, above 0 and up to 1; UserError otherwise."""
        if not is_number(density) or not 0 < density <= 1:
            raise UserError(f"density={density!r} is not a share of the atoms; choose one above 0 and up to 1")
        self.density = float(density)

    def usage_depends_on(self):
        """What `usage` depends on: when this changes, `usage` is out of date."""
        return self.density, checksum(self.W_s)

    @property
    def k(self):
        """How many coefficients of a token top-k keeps: max(1, round(ρ M))."""
        return max(1, round(self.density * self.atoms))

    @property
    def options(self):
        """What `attach` needs to build this adapter again."""
        how_sparse = {"density": self.density} if self.threshold == "top_k" else {"lam": self.lam}
        return {"atoms": self.atoms, "threshold": self.threshold, **how_sparse, "order": self.order}

    def sigma(self, z):
        """σ_λ over the M values of each token"""
        if self.threshold == "top_k":
            return top_k(z, self.k)  # (B, N, M)
        return (soft_threshold if self.threshold == "soft" else relu_threshold)(z, self.lam)  # (B, N, M)

    def encode(self, x):
        """What attention mixes over tokens: σ_λ(X W_s) for order="before", X W_s for "after"."""
        z = x @ self.W_s.to(x.dtype)  # (B, L, C_i) x (C_i, M) -> (B, L, M)
        return self.sigma(z) if self.order == "before" else z  # (B, L, M)

    def coefficients(self, mixed):
        """S, from the output of attention: `mixed` itself for order="before", σ_λ(mixed) for "after"."""
        return self.sigma(mixed) if self.order == "after" else mixed  # (B, N, M)

    def forward(self, coefficients):
        """scale · ΔO = scale · S D, over the atoms that are kept"""
        atoms = self.D * self.keep[:, None] * self.scale  # (M, C_o)
        return coefficients @ atoms.to(coefficients.dtype)  # (B, N, M) x (M, C_o) -> (B, N, C_o)

    def silent(self):
        """Whether ΔO is zero for every input: scale 0, D untrained, or no atom kept.

        Under torch.compile the answer is always False. The check has to wait for a GPU, so its result is cached.
        """
        if torch.compiler.is_compiling():
            return False
        if self.scale == 0:
            return True
        return self.remembered(lambda: not (self.D.any(dim=1) & self.keep).any().item(), self.D, self.keep)


class NotAlone(torch.Tensor):
    """A weight that PyTorch's fused fast paths refuse, because they accept no subclass of Tensor."""


class SparseAttention(Wrapper):
    """O + ΔO = O + S D, with S from the same attention map as O    (Eq. 9)

    Wraps any attention that `kinds.py` knows, and has its signature and attributes. X in X W_s are the tokens that V is
    computed from; in cross-attention, the context. If there are several adapters, each adds its ΔO.
    """

    def __init__(self, base, adapter):
        super().__init__(base)
        self.adapter, self.more = adapter, nn.ModuleList()
        self.together = [[adapter]]  # all adapters of the model; `attach.loaded`

    def lend(self, name, value):
        """Weights of the base with a mark, for nn.TransformerEncoderLayer, which reads them.

        Without gradients, that layer computes the attention itself from these weights and bypasses this module. It may
        do so only while all sparse adapters are silent, because nn.TransformerEncoder decides once for all its layers.
        Adapters of Linears are in the weights that it reads.
        """
        everyone = [adapter for group in self.together for adapter in group if adapter.method == "sparse"]
        if isinstance(value, torch.Tensor) and (torch.is_grad_enabled() or not all(a.silent() for a in everyone)):
            return value.as_subclass(NotAlone)
        return value

    @property
    def active(self):
        """The adapters to compute. One of scale 0 beside others is left out, so that rounding does not change."""
        everyone = [self.adapter, *self.more]
        return [adapter for adapter in everyone if adapter.scale != 0] or everyone

    def take_apart(self, args, kwargs):
        kind = kind_of(self.base)
        if obstacle := kind.obstacle(self.base):  # the base may have changed since `attach`
            raise UserError(f"this attention cannot be taken apart: {obstacle}")
        return kind.take_apart(self.base, *args, **kwargs)

    def forward(self, *args, **kwargs):
        """One attention pass A [V | X W_s] gives O and S together; several adapters: A [V | X W_s¹ | X W_s² | …].

        Fused kernels need q, k and v of equal width, so q and k are padded with zeros; the scale stays that of the
        unpadded head. Padding can change how a kernel rounds O. So with a silent adapter O comes from the base itself
        and is the same to the bit (except under torch.compile, which always pads).

        Fused kernels support a head width of up to 256. Here it is C/H + M/H, in PixArt-Σ 72 + M/16: 88 at M = 256.
        Above M = 2,944 PyTorch falls back to its slow kernel.
        """
        parts = self.take_apart(args, kwargs)  # q (B, H, N, C/H), k and v (B, H, L, C/H)
        active = self.active
        z = [split_heads(a.encode(parts.tokens), a.heads) for a in active]  # each (B, L, M) -> (B, H, L, M/H)
        widths = [each.shape[-1] for each in (parts.v, *z)]  # C/H, M/H of each
        extra = sum(widths[1:])
        mixed = parts.attend(
            F.pad(parts.q, (0, extra)),  # (B, H, N, C/H + M/H)
            F.pad(parts.k, (0, extra)),  # (B, H, L, C/H + M/H)
            torch.cat([parts.v, *z], dim=-1),  # (B, H, L, C/H + M/H)
        )
        o, *mixed = mixed.split(widths, dim=-1)  # (B, H, N, C/H), each (B, H, N, M/H)
        result = self.base(*args, **kwargs) if all(a.silent() for a in active) else parts.output(o)
        for adapter, s in zip(active, mixed):
            result = parts.add(result, adapter(adapter.coefficients(merge_heads(s))))  # s -> (B, N, M) -> (B, N, C_o)
        return result

    def forward_naive(self, *args, **kwargs):
        """The same, by the paper's formula: O first, then S from the explicit attention map."""
        parts = self.take_apart(args, kwargs)
        a = parts.attention_map()  # (B, H, N, L)
        result = self.base(*args, **kwargs)
        for adapter in self.active:
            z = adapter.encode(parts.tokens)  # (B, L, M)
            mixed = merge_heads(a @ split_heads(z, adapter.heads))  # (B, H, N, L) x (B, H, L, M/H) -> (B, N, M)
            result = parts.add(result, adapter(adapter.coefficients(mixed)))
        return result
