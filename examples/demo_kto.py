"""
The second act of `demo.py`: the same small model, aligned with ELBO-KTO from thumbs instead of pairs.

1. take the pre-trained model of `demo.py`, or make it;
2. let it answer problems four times each, and mark every answer as right or wrong: no pairs, no answer but its own;
3. align it on the marked answers: `elbo_kto_lora.py`, which is the script for real models too;
4. answer held-out problems before and after.
"""

import demo

# Answers to problems that the model always solves are among the marked ones and seem to hold it: trained on those to
# the other problems alone, one model unlearned everything
ALIGNMENT = demo.ALIGNMENT | {
    "loss_type": "kto",
    "batch_composition": "balanced",
    "beta": 0.3,
    "per_device_train_batch_size": 16,  # as many responses as in eight pairs
}
ALIGNMENT.pop("loss_weights")

ELBO_KTO = demo.Act(
    method="ELBO-KTO",
    script="elbo_kto_lora.py",
    data="thumbs",
    columns=("prompt", "completion", "label"),
    settings=ALIGNMENT,
    watched="Loss and margin",
    reading="docs/elbo-kto-trainer.md says what the options do",
)

if __name__ == "__main__":
    demo.run(ELBO_KTO, __doc__)
