"""Quantize a model, measure the loss, save it, and publish it if a repository is named.

python examples/quantize_and_publish.py [--model FOLDER_OR_HUB_ID] [--out FOLDER] [--repo USER/NAME]
"""

import argparse

from qarvd_diffusers import ARVDPipeline, QARVDConfig, bundled_model_path, evaluate

PROMPTS = ["a large red circle moving left on a navy background"]

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=bundled_model_path())
parser.add_argument("--out", default="bundled-w8a8")
parser.add_argument("--repo")
args = parser.parse_args()

reference = ARVDPipeline.from_pretrained(args.model)
quantized = ARVDPipeline.from_pretrained(args.model, quantization_config=QARVDConfig("w8a8"))

report = evaluate(reference, quantized, PROMPTS, num_chunks=3)  # the same noise for both
print("PSNR per chunk, dB:", [round(value, 1) for value in report["psnr_db"]])

quantized.save_pretrained(args.out, report=report)  # the model card shows the report
if args.repo:
    print(quantized.push_to_hub(args.repo, report=report))
