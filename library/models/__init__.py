"""U-Net, text encoders and VAE, and the files they come from and go to.

family              what tells the families of Stable Diffusion apart
model               all parts of one model, in memory
text                what captions become: token ids, then text states
unet                the U-Net, its parameters named as Stability's checkpoint keys
attention           scaled dot-product attention over interchangeable backends
attention_trial     fused attention tried once on a device, against the formula
prediction          what is trained to be predicted, by flags and by what the files say
denoiser            the U-Net and its text encoders as the one module that trains
text_encoders       captions to token ids, token ids to text states
weighted_captions   weights in captions, `(word:1.3)`
token_counts        how many tokens captions have
vae                 pictures to scaled latents and back
fused_ops           a norm and what follows it as one autograd function
gelu                GELU in its erf form on every device, alone and as the feed-forward's gated unit
cpu_kernels         linear layers and convolutions by the faster of the CPU's kernels
compiled            the U-Net's blocks compiled by torch.compile
keyed_dropout       dropout masks as a function of seed, step, sample and module
network_view        the networks' layers by the classes and paths under which LoRA and its kin look for them
files/              reading and writing models
"""
