//! The commands: one file each, its module and one line in the list below.

use std::process::ExitCode;

use crate::failure::Failure;

mod chat;
mod compare;
mod convert;
mod data;
mod eval;
mod generate;
mod intrinsic;
mod merge;
mod methods;
mod plan;
mod probe_device;
mod score;
mod switch;
mod train;
mod unmerge;

macro_rules! commands {
    ($($(#[$attribute:meta])* $module:ident => $variant:ident,)*) => {
        /// What to do.
        #[derive(clap::Subcommand)]
        pub enum Command {
            $($(#[$attribute])* $variant(Box<$module::Args>),)*
        }

        impl Command {
            /// Does it.
            pub fn run(self) -> Result<ExitCode, Failure> {
                match self {
                    $(Self::$variant(args) => $module::run(*args),)*
                }
            }
        }
    };
}

commands! {
    /// Fine-tune a model on rows of text or conversations.
    train => Train,
    /// Predict what a run trains, and its memory and time; nothing runs.
    plan => Plan,
    /// Compare methods on your data: each tuned alike, with intervals and what they cost.
    compare => Compare,
    /// Find how few numbers, carried to all weights at random, do nearly as well as all weights.
    intrinsic => Intrinsic,
    /// Loss, perplexity and, where answers are labels, accuracy of a model on rows.
    eval => Eval,
    /// Log-probability of every token of rows.
    score => Score,
    /// Continue a prompt.
    generate => Generate,
    /// Talk with a model.
    chat => Chat,
    /// Show rows as the model sees them, with what is trained on.
    data => Data,
    /// Write the model with an adapter folded into its weights.
    merge => Merge,
    /// Take an adapter out of a merged model again.
    unmerge => Unmerge,
    /// Replace one adapter by another in a merged model.
    switch => Switch,
    /// Turn an adapter of any method into plain LoRA, and measure what that loses.
    convert => Convert,
    /// List methods, start values and optimizers with their settings.
    methods => Methods,
    /// Open a device and end, as `--device` has it done before it opens one itself.
    #[command(hide = true)]
    probe_device => ProbeDevice,
}
