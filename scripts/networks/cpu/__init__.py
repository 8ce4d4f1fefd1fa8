# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Networks on a CPU: less arithmetic, slabs, streaming, weights out of memory.

Imports what `networks` imports, and `networks`. With a GPU nothing of this runs.
"""
