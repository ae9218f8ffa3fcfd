"""The fifty-six published systems that this library hosts, and the question each asks about the timestep."""

from typing import NamedTuple


class System(NamedTuple):
    """A published system. `question` is what it makes a function of the timestep."""

    slug: str
    title: str
    question: str


# fmt: off
SYSTEMS = (
    System("accvideo", "AccVideo: Accelerating Video Diffusion Model with Synthetic Dataset", "how one gets from t to t'"),
    System("addp", "ADDP: Aligning Generative Denoising with Discriminative Objectives Unleashes Diffusion for Visual Perception", "which t are trained"),
    System("alignhuman", "AlignHuman: Improving Motion and Fidelity via Timestep-Segment Preference Optimization for Audio-Driven Human Animation", "which network runs at t"),
    System("ant", "ANT: Addressing Negative Transfer in Diffusion Models", "which t are trained"),
    System("ar_diffusion", "AR-Diffusion: Asynchronous Video Generation with Auto-Regressive Diffusion", "what t is"),
    System("autolora", "AutoLoRA: Automatic LoRA Retrieval and Fine-Grained Gated Fusion for Text-to-Image Generation", "which network runs at t"),
    System("b2_diffurl", "B2-DiffuRL: Towards Better Alignment: Training Diffusion Models with Reinforcement Learning Against Sparse Rewards", "what is learned along the trajectory"),
    System("bdia", "BDIA: Exact Diffusion Inversion via Bi-directional Integration Approximation", "how one gets from t to t'"),
    System("cg_taylor", "CG-Taylor: Forecasting When to Forecast: Accelerating Diffusion Models with Confidence-Gated Taylor", "what is reused from earlier t"),
    System("consissr", "ConsisSR: Delving Deep into Consistency in Diffusion-based Image Super-Resolution", "how data becomes noise at t"),
    System("contextdiff", "ContextDiff: Cross-Modal Contextualized Diffusion Models for Text-Guided Visual Generation and Editing", "how data becomes noise at t"),
    System("ctrl_adapter", "Ctrl-Adapter: An Efficient and Versatile Framework for Adapting Diverse Controls to Any Diffusion Model", "which t are trained"),
    System("deediff", "DeeDiff: Dynamic Uncertainty-Aware Early Exiting for Accelerating Diffusion Model Generation", "which network runs at t"),
    System("diff_v2m", "Diff-V2M: A Hierarchical Conditional Diffusion Model with Explicit Rhythmic Modeling for Video-to-Music Generation", "what condition is seen at t"),
    System("difficulty_curriculum", "Difficulty curriculum: Denoising Task Difficulty-based Curriculum for Training Diffusion Models", "which t are trained"),
    System("diffusion_classifiers", "Diffusion classifiers: Diffusion Classifiers Understand Compositionality, but Conditions Apply", "what is decided at sampling time"),
    System("diversity_distillation", "Diversity Distillation: Distilling Diversity and Control in Diffusion Models", "which network runs at t"),
    System("dtr", "DTR: Denoising Task Routing for Diffusion Models", "which network runs at t"),
    System("dydit", "DyDiT++: Dynamic Diffusion Transformers for Efficient Visual Generation", "which network runs at t"),
    System("dynamic_cfg", "Dynamic CFG: Dynamic Classifier-Free Diffusion Guidance via Online Feedback", "what condition is seen at t"),
    System("elect", "ELECT: Early Timestep Zero-Shot Candidate Selection for Instruction-Guided Image Editing", "what is decided at sampling time"),
    System("ella", "ELLA: Equip Diffusion Models with LLM for Enhanced Semantic Alignment", "what condition is seen at t"),
    System("ertacache", "ERTACache: Error Rectification and Timesteps Adjustment for Efficient Diffusion", "what is reused from earlier t"),
    System("fantasytalking2", "FantasyTalking2: Timestep-Layer Adaptive Preference Optimization for Audio-Driven Portrait Animation", "which network runs at t"),
    System("fastfit", "FastFit: Accelerating Multi-Reference Virtual Try-On via Cacheable Diffusion Models", "what is reused from earlier t"),
    System("fvdm", "FVDM: Redefining Temporal Modeling in Video Diffusion: The Vectorized Timestep Approach", "what t is"),
    System("in_2_4d", "In-2-4D: Inbetweening from Two Single-View Images to 4D Generation", "what is decided at sampling time"),
    System("instruct_clip", "Instruct-CLIP (I-CLIP): Improving Instruction-Guided Image Editing with Automated Data Refinement Using Contrastive Learning", "what condition is seen at t"),
    System("ita_mdt", "ITA-MDT: Image-Timestep-Adaptive Masked Diffusion Transformer Framework for Image-Based Virtual Try-On", "what condition is seen at t"),
    System("latent_inversion", "Latent Inversion (TOLI): Latent Inversion with Timestep-aware Sampling for Training-free Non-rigid Editing", "how one gets from t to t'"),
    System("lavida", "LaViDa: A Large Diffusion Language Model for Multimodal Understanding", "how data becomes noise at t"),
    System("live_avatar", "Live Avatar: Streaming Real-time Audio-Driven Avatar Generation with Infinite Length", "what t is"),
    System("lucidflux", "LucidFlux: Caption-Free Universal Image Restoration via a Large-Scale Diffusion Transformer", "what condition is seen at t"),
    System("maskunet", "MaskUNet: Not All Parameters Matter: Masking Diffusion Models for Enhancing Generation Ability", "which network runs at t"),
    System("medim", "MeDiM: Discrete Diffusion Models with MLLMs for Unified Medical Multimodal Generation", "how data becomes noise at t"),
    System("mmd_ddm", "MMD-DDM: Fast Inference in Denoising Diffusion Models via MMD Finetuning", "what is learned along the trajectory"),
    System("oscar", "OSCAR: One-Step Diffusion Codec Across Multiple Bit-rates", "how data becomes noise at t"),
    System("pso", "PSO: Tuning Timestep-Distilled Diffusion Model Using Pairwise Sample Optimization", "what is learned along the trajectory"),
    System("pusa", "Pusa V1.0: Surpassing Wan-I2V with $500 Training Cost by Vectorized Timestep Adaptation", "what t is"),
    System("q_diffusion", "Q-Diffusion: Quantizing Diffusion Models", "at what precision it runs at t"),
    System("qnerf", "QNeRF: Consolidating Attention Features for Multi-view Image Editing", "what condition is seen at t"),
    System("radd", "RADD: Your Absorbing Discrete Diffusion Secretly Models the Conditional Distributions of Clean Data", "how data becomes noise at t"),
    System("raphael", "RAPHAEL: Text-to-Image Generation via Large Mixture of Diffusion Paths", "which network runs at t"),
    System("reatco", "ReAtCo: Re-Attentional Controllable Video Diffusion Editing", "what condition is seen at t"),
    System("red_diff", "RED-diff: A Variational Perspective on Solving Inverse Problems with Diffusion Models", "what is decided at sampling time"),
    System("scaledreamer", "ScaleDreamer: Scalable Text-to-3D Synthesis with Asynchronous Score Distillation", "what is decided at sampling time"),
    System("sdp", "SDP: Streaming Diffusion Policy: Fast Policy Synthesis with Variable Noise Diffusion Models", "what t is"),
    System("shadow_removal", "Residual shadow removal: Controlling the Latent Diffusion Model for Generative Image Shadow Removal via Residual Generation", "how data becomes noise at t"),
    System("t_stitch", "T-Stitch: Accelerating Sampling in Pre-Trained Diffusion Models with Trajectory Stitching", "which network runs at t"),
    System("taylorseer", "TaylorSeer: From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", "what is reused from earlier t"),
    System("tbcm", "TBCM: Image-Free Timestep Distillation via Continuous-Time Consistency with Trajectory-Sampled Pairs", "how one gets from t to t'"),
    System("unidiffuser", "UniDiffuser: One Transformer Fits All Distributions in Multi-Modal Diffusion at Scale", "what t is"),
    System("uwm", "UWM: Unified World Models: Coupling Video and Action Diffusion for Pretraining on Large Robotic Datasets", "what t is"),
    System("videoscene", "VideoScene: Distilling Video Diffusion Model to Generate 3D Scenes in One Step", "how one gets from t to t'"),
    System("vidit_q", "ViDiT-Q: Efficient and Accurate Quantization of Diffusion Transformers for Image and Video Generation", "at what precision it runs at t"),
    System("zoodip", "ZOODiP: Efficient Personalization of Quantized Diffusion Model without Backpropagation", "which t are trained"),
)
# fmt: on

BY_SLUG = {system.slug: system for system in SYSTEMS}
