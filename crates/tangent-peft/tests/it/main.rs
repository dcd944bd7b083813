//! Adapters on small models: the laws that every method keeps, and stored references.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod adalora;
mod bottleneck;
mod combined;
mod convert;
mod dora;
mod export;
mod ia3;
mod inits;
mod intrinsic;
mod laws;
mod llama;
mod loha;
mod lokr;
mod lora;
mod lst;
mod monarch;
mod moved_base;
mod norms;
mod oft;
mod pairs;
mod quantized;
mod requantized;
mod select;
mod starts;
mod stored;
mod variants;
mod vera;
mod virtual_tokens;
