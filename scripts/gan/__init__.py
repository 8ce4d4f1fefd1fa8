# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The paper's baselines, LSGAN and VAE-GAN: their networks and what these are trained for.

Imports the rooms from `core` to `autoencoder`.
"""
