"""Experts in 4-bit, 8-bit and dense storage, decoded whole, selected or in chunks."""

from ..ops.dequantize import DequantizePlan, NestedScales
from .active import ActiveExperts, active_experts, chunks
from .formats import Dense, Float8, FourBit, Int8RowWise, StoredExperts
from .sources import four_bit, stored_experts
from .weight import StoredWeight

__all__ = [
    "ActiveExperts",
    "Dense",
    "DequantizePlan",
    "Float8",
    "FourBit",
    "Int8RowWise",
    "NestedScales",
    "StoredExperts",
    "StoredWeight",
    "active_experts",
    "chunks",
    "four_bit",
    "stored_experts",
]
