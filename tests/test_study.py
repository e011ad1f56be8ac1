"""The study's pictures and tables."""

import evaluate
import study
from PIL import Image


def test_curves_are_drawn(tmp_path):
    lines = ["phase,step,itm,hard,val_tr_r1"]
    for step in range(10, 60, 10):
        hard = 0.0 if step >= 40 else ""
        lines.append(f"warmup,{step},{4 / step},{hard},{'nan' if step == 20 else step}")
    (tmp_path / "log.csv").write_text("\n".join(lines))
    study.draw_curves(tmp_path)
    drawn = Image.open(tmp_path / "curves.png")
    assert drawn.size == (evaluate.WIDTH, 3 * 60 + 16)  # itm, hard, val_tr_r1
    assert evaluate.ORANGE in [colour for _, colour in drawn.getcolors(1 << 20)]
    (tmp_path / "log.csv").write_text("\n".join(lines[:2]))
    study.draw_curves(tmp_path)
