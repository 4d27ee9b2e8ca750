"""Callbacks for training frameworks; installed as ft_launcher.integrations."""
