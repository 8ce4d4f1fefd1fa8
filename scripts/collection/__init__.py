# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Large sets of samples: rows drawn from a law, made in shards by any number of workers, checked, exported.

Imports the rooms from `core` to `evaluation`.
"""
