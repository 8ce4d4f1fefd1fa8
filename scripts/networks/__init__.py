# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Networks whatever they are trained for: weights and their facts, adapters, patches.

Imports the rooms from `core` to `volumes`. `cpu` makes them fast on a CPU: nobody with a GPU enters there.
"""
