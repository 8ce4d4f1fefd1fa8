# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""One module a metric, and the networks whose features metrics compare.

Imports what `evaluation` imports.
"""
