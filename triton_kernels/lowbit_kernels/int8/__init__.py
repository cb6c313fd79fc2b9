# SPDX-License-Identifier: Apache-2.0
"""Products of integer activations with integer weights: layout, kernels and operators."""
