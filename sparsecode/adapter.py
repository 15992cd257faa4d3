"""The method: a frozen attention plus a sparse combination of learned atoms (Eqs. 8–9, §3.4)."""

import operator

import torch
import torch.nn.functional as F
from torch import nn

from .attention import merge_heads, split_heads
from .common import UserError, checksum, is_number, is_whole
from .kinds import kind_of
from .thresholds import relu_threshold, soft_threshold, top_k

THRESHOLDS = ("top_k", "soft", "relu")
ORDERS = ("before", "after")


class Adapter(nn.Module):
    """What the methods share: numbers that stay in float32, and results that last until a parameter changes."""

    def __init__(self):
        super().__init__()
        self._memory = None
        self.scale = 1.0  # of ΔO; `set_scale`

    def silent(self):
        """Whether it changes nothing, for every input."""
        return self.scale == 0

    def _apply(self, fn, recurse=True):
        """`model.to(torch.bfloat16)` and the like move an adapter, but leave it as precise as it was."""

        def precise(value):
            moved = fn(value)
            return value.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        self._memory = None
        return super()._apply(precise, recurse)

    def remembered(self, compute, *tensors):
        """compute(), done again only after one of `tensors` was changed in place (by its version counter) or replaced.

        A change through `tensor.data` is not counted; change the tensor itself, under torch.no_grad().
        """
        versions = [(None if v.is_inference() else v._version, v.dtype, v.device) for v in tensors]
        if self._memory is None or self._memory[1] != versions or any(map(operator.is_not, self._memory[0], tensors)):
            self._memory = tensors, versions, compute()
        return self._memory[2]

    def while_frozen(self, compute, *tensors):
        """compute(), remembered where no gradient is asked for."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return compute()
        return self.remembered(compute, *tensors)


class SparseAdapter(Adapter):
    """What is trained: W_s (C_i, M), which makes the coefficients S, and the atoms D (M, C_o)

        order="before"    S = A σ_λ(X W_s)    what the paper runs (§3.4)
        order="after"     S = σ_λ(A X W_s)    (Eq. 8)

    and ΔO = S D. `density` sets top-k, `lam` the soft and relu thresholds. The M atoms are split
    evenly over the heads, and the coefficients of a head are mixed by its own A⁽ʰ⁾; top-k picks among
    all M of a token. D starts at zero, so a fresh adapter is silent; W_s starts at the scale that
    gives a layer-normed X coefficients of about unit variance.

    `keep` switches atoms on and off without retraining, and `usage` is the mean |S_m| last measured
    (both are set by `atoms.py`).
    """

    method = "sparse"

    def __init__(self, in_dim, out_dim, heads, *, atoms=256, density=0.02, threshold="top_k", lam=None, order="before"):
        super().__init__()
        if not is_whole(atoms) or atoms < 1 or atoms % heads:
            raise UserError(f"atoms={atoms} does not split over {heads} heads; choose a multiple of {heads}")
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
        self.measured_with = None  # usage_depends_on() of that time
        self.register_buffer("keep", torch.ones(atoms, dtype=torch.bool), persistent=False)  # (M,)

    def set_density(self, density):
        if not is_number(density) or not 0 < density <= 1:
            raise UserError(f"density={density!r} is not a share of the atoms; choose one above 0 and up to 1")
        self.density = float(density)

    def usage_depends_on(self):
        """What `usage` is measured with; the usage is out of date when this has changed."""
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
        """S, from what attention has mixed: itself for order="before", σ_λ(mixed) for "after"."""
        return self.sigma(mixed) if self.order == "after" else mixed  # (B, N, M)

    def forward(self, coefficients):
        """scale · ΔO = scale · S D, over the atoms that are kept"""
        atoms = self.D * self.keep[:, None] * self.scale  # (M, C_o)
        return coefficients @ atoms.to(coefficients.dtype)  # (B, N, M) x (M, C_o) -> (B, N, C_o)

    def silent(self):
        """Whether ΔO is zero for every input: scale 0, D untrained, or no atom kept.

        torch.compile takes it for not silent. Asking a GPU waits for it, so the answer is remembered.
        """
        if torch.compiler.is_compiling():
            return False
        if self.scale == 0:
            return True
        return self.remembered(lambda: not (self.D.any(dim=1) & self.keep).any().item(), self.D, self.keep)


class NotAlone(torch.Tensor):
    """A weight that fused kernels leave alone: PyTorch's fast paths ask for tensors of no special class."""


class SparseAttention(nn.Module):
    """O + ΔO = O + S D, with S from the same attention map as O    (Eq. 9)

    Wraps an attention of any kind in `kinds.py`, has its signature, and lends its attributes. X in X W_s are the tokens
    that V is made of: of cross-attention, the context. Several adapters add a ΔO each.
    """

    def __init__(self, base, adapter):
        super().__init__()
        self.base, self.adapter, self.more = base, adapter, nn.ModuleList()
        self.together = [[adapter]]  # all adapters of the model; `attach.loaded`

    def __getattr__(self, name):
        """The base's attributes, for code that reads them, such as nn.TransformerEncoderLayer.

        Without gradients that layer takes the weights and computes everything itself, past this module. It may do so
        only while all adapters are silent: nn.TransformerEncoder decides for all its layers at once.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
        value = getattr(self.base, name)
        everyone = [adapter for group in self.together for adapter in group]
        if isinstance(value, nn.Parameter) and (torch.is_grad_enabled() or not all(a.silent() for a in everyone)):
            return value.as_subclass(NotAlone)
        return value

    @property
    def active(self):
        """The adapters to compute. One of scale 0 beside others is left out, so that they round as they do alone."""
        everyone = [self.adapter, *self.more]
        return [adapter for adapter in everyone if adapter.scale != 0] or everyone

    def take_apart(self, args, kwargs):
        kind = kind_of(self.base)
        if obstacle := kind.obstacle(self.base):  # something can have changed since `attach`
            raise UserError(f"this attention cannot be taken apart: {obstacle}")
        return kind.take_apart(self.base, *args, **kwargs)

    def forward(self, *args, **kwargs):
        """One pass A [V | X W_s] gives O and S together; of several adapters A [V | X W_s¹ | X W_s² | …].

        Fused kernels want q, k and v equally wide: q and k are padded with zeros, and the scale stays
        that of the unpadded head. Padding can change how a kernel rounds O, so with a silent adapter O comes
        from the base itself, to the bit. (torch.compile pads always.)

        Fused kernels take heads of up to 256 numbers. Here a head has C/H + M/H: in PixArt-Σ 72 + M/16, which is 88 at
        M = 256. Above M = 2,944 the fused kernels are lost, and the slow one takes over.
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
        """The same as it stands in the paper: O first, then S from the attention map written out."""
        parts = self.take_apart(args, kwargs)
        a = parts.attention_map()  # (B, H, N, L)
        result = self.base(*args, **kwargs)
        for adapter in self.active:
            z = adapter.encode(parts.tokens)  # (B, L, M)
            mixed = merge_heads(a @ split_heads(z, adapter.heads))  # (B, H, N, L) x (B, H, L, M/H) -> (B, N, M)
            result = parts.add(result, adapter(adapter.coefficients(mixed)))
        return result
