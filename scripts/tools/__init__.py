# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Programs of their own, `python -m scripts.tools.NAME`: nothing imports them.

They may import every other room.
"""
