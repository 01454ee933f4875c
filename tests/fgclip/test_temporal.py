"""Attention pooling over the frames of a video."""

import torch

from fgclip.temporal import TemporalPool


def test_recorded_videos(golden):
    g = golden("temporal_pool")
    pool = TemporalPool(g.config["d_model"], heads=g.config["nhead"], layers=g.config["layers"]).eval()
    pool.load_state_dict(g.state())
    torch.testing.assert_close(pool(g["frames_nomask"]), g["video_nomask"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(pool(g["frames_mask"], g["mask"].bool()), g["video_mask"], rtol=1e-4, atol=2e-5)


def test_what_is_masked_does_not_count():
    torch.manual_seed(0)
    pool = TemporalPool(16).eval()
    frames, mask = torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    other = torch.where(mask[..., None], frames, torch.randn(2, 5, 16))
    torch.testing.assert_close(pool(frames, mask), pool(other, mask))
    torch.testing.assert_close(pool(frames, mask)[:1], pool(frames[:1, :3]))
    assert not torch.allclose(pool(frames)[0], pool(frames, mask)[0])
    torch.testing.assert_close(pool(frames).norm(dim=1), torch.ones(2))


def test_every_parameter_gets_a_gradient():
    pool = TemporalPool(16)
    pool(torch.randn(2, 5, 16))[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pool.parameters())
    assert all(p.grad.abs().max() > 1e-6 for name, p in pool.named_parameters() if name.endswith("weight"))
