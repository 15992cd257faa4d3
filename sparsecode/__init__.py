"""The mathematics of sparse fine-tuning: sparse coding, adapters for attention, and tools to study their atoms."""

from .adapter import SparseAdapter, SparseAttention
from .atoms import importance, keep_atoms, orthogonality, record_maps, record_usage, set_density, top_atoms
from .attach import adapters, attach, detach, set_scale, trainable
from .attention import Attention, attention_as_dictionary
from .baselines import OFT, DoRA, LoRA
from .common import UserError, replacing
from .cost import Cost, attention_flops, dora_cost, lora_cost, oft_cost, sparse_cost
from .dictionary import learn_dictionary
from .files import load_adapter, read_header, save_adapter, weights_checksums
from .influence import additivity_error, effect, first_order, linearity_error, only_atoms, scale_atoms
from .lasso import fista, ista, lasso_objective, optimality_gap
from .thresholds import relu_threshold, soft_threshold, top_k

__all__ = [
    "Attention",
    "Cost",
    "DoRA",
    "LoRA",
    "OFT",
    "SparseAdapter",
    "SparseAttention",
    "UserError",
    "adapters",
    "additivity_error",
    "attach",
    "attention_as_dictionary",
    "attention_flops",
    "detach",
    "dora_cost",
    "effect",
    "first_order",
    "fista",
    "importance",
    "ista",
    "keep_atoms",
    "lasso_objective",
    "learn_dictionary",
    "linearity_error",
    "load_adapter",
    "lora_cost",
    "oft_cost",
    "only_atoms",
    "optimality_gap",
    "orthogonality",
    "read_header",
    "record_maps",
    "record_usage",
    "relu_threshold",
    "replacing",
    "save_adapter",
    "scale_atoms",
    "set_density",
    "set_scale",
    "soft_threshold",
    "sparse_cost",
    "top_atoms",
    "top_k",
    "trainable",
    "weights_checksums",
]
