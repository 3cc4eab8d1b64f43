"""Measurements side by side, behind `twinpilots bench`: contenders in processes of their own, alternating rounds, medians with bounds."""
