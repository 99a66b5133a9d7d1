"""TRL's PPOTrainer, last seen in trl 1.12 (`trl.experimental.ppo`): whole iterations, or one run of a single iteration.

python with_trl.py DIRECTORY loop|once
"""

# pyright: reportMissingImports=false

import sys

from serve import Gate, finished, sizes

directory, mode = sys.argv[1:]

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

shape = sizes(directory)
tokenizer = AutoTokenizer.from_pretrained(f"{directory}/model", padding_side="left")
rows = load_dataset("json", data_files=f"{directory}/prompts.jsonl", split="train")
rows = rows.map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=rows.column_names)
reward = AutoModelForSequenceClassification.from_pretrained(f"{directory}/reward", num_labels=1)
value = AutoModelForSequenceClassification.from_pretrained(f"{directory}/reward", num_labels=1)
if mode == "loop":
    gate = Gate()
    reward.score.register_forward_pre_hook(lambda *_: gate())
trainer = PPOTrainer(
    args=PPOConfig(
        output_dir=f"{directory}/trl",
        per_device_train_batch_size=shape["batch"],
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=shape["batch"] * (1 if mode == "once" else 1000),
        local_rollout_forward_batch_size=shape["batch"],
        response_length=shape["response"],
        temperature=1.0,
        learning_rate=1e-6,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
    ),
    processing_class=tokenizer,
    model=AutoModelForCausalLM.from_pretrained(f"{directory}/model"),
    ref_model=AutoModelForCausalLM.from_pretrained(f"{directory}/model"),
    reward_model=reward,
    value_model=value,
    train_dataset=rows,
    eval_dataset=rows.select(range(shape["batch"])),
)
trainer.train()
finished(directory)
