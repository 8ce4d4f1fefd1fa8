# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What everything stands on: errors, options, the running configuration, paths, files, tables, statistics.

Imports nothing of the other rooms, and little of other packages: whoever reads a room below need not read this one.
"""
