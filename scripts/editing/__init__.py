# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""A person's own head under other conditions, with parts drawn anew, or on the way to another head."""
