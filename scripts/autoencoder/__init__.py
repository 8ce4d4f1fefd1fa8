# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The autoencoder: its training and losses, the encoding of a data set, latents on disk.

Imports the rooms from `core` to `diffusion`.
"""
