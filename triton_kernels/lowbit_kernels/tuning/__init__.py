# SPDX-License-Identifier: Apache-2.0
"""Which kernel and configuration runs a product: rules, tables, and the measurements that make the tables."""
