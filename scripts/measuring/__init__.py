# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What tells structures and age in a volume: the segmenter, tools beside it, the brain-age network.

Imports the rooms from `core` to `autoencoder`. Preparation, phantoms and evaluation measure with it.
"""
