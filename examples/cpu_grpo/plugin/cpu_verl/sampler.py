"""verl's own replay buffer, asked more often than every two seconds."""

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync


def impatient_replay_buffer(trainer_mode, sampler_kwargs, **kwargs):
    """Built by verl through `trainer.v1.sampler.custom_sampler`; a step here takes well under a second."""
    cls = ReplayBuffer if trainer_mode == "sync" else ReplayBufferAsync
    poll_interval = sampler_kwargs.get("poll_interval", 0.05)
    return cls(trainer_mode=trainer_mode, sampler_kwargs=sampler_kwargs, poll_interval=poll_interval, **kwargs)
