"""Falcon-Mamba as transformers has it: Mamba with norms that have no weights on dt, B and C."""

from .mamba import Mamba


class FalconMamba(Mamba):
    name, architecture = "falcon_mamba", "FalconMambaForCausalLM"
    own = f"{Mamba.own} mixer_rms_eps"
    neutral = f"{Mamba.neutral} use_falcon_mambapy"

    def to_bmojo(self, config):
        return super().to_bmojo(config) | {
            "mixer_norm": "weightless",
            "mixer_rms_eps": self.read(config).mixer_rms_eps,
        }

    def export_own(self, config):
        return super().export_own(config) | {"mixer_rms_eps": config.mixer_rms_eps}
