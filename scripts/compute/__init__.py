# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Where and how to compute: devices, processes, precision, pools, background writing, values that are kept.

Imports `core` alone, and knows nothing of volumes, networks or conditions.
"""
