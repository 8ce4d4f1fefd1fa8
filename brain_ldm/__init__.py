# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The bundle as a package of Python's: where it is installed, this folder holds configurations, scripts and models.

`scripts` is imported by that name, as MONAI's configurations have it, from here and from nowhere else.
"""
