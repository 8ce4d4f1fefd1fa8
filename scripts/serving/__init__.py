# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The local web page: the commands' own workflow under sliders, and volumes in a viewer."""
