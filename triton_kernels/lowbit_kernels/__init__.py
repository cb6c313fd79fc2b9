# SPDX-License-Identifier: Apache-2.0
"""Dequant-fused matmul kernels. This package starts with their definition in plain torch; see the README beside it."""

from lowbit_kernels.reference import dequantize, linear

__all__ = ["dequantize", "linear"]
