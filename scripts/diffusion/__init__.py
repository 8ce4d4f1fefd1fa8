# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Diffusion models: schedules and targets, the objective, samplers, the denoiser, guidance, their training.

Imports the rooms from `core` to `training`.
"""
