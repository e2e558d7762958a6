//! Steps of a few small tensors on one thread, for counting instructions: `fixed_cost SCENARIO STEPS`.
//!
//! The tensors are so small that nearly all of a step is its fixed cost: checks, coefficients, the plan, the calls.
//! `fixed_cost.py` runs this under valgrind with two counts of steps, whose difference is free of what happens once.
//! Without arguments it prints the names of the scenarios, and with `isa` the instruction set that steps run with.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program of its own")]

use std::process::ExitCode;

use roptim::cpu::Isa;
use roptim::{Dtype, Guard, Optimizer, Options, ParamInfo, Value};

/// What is stepped.
struct Scenario {
    name: &'static str,
    optimizer: &'static str,
    hypers: &'static [(&'static str, Value)],
    tensors: usize,
    /// Elements of each tensor.
    elements: usize,
    /// Whether each tensor has a group of its own.
    group_each: bool,
    clip_norm: Option<f64>,
}

/// The plainest.
const ONE: Scenario = Scenario {
    name: "AdamW, one tensor of 16",
    optimizer: "AdamW",
    hypers: &[],
    tensors: 1,
    elements: 16,
    group_each: false,
    clip_norm: None,
};

const MANY: Scenario = Scenario { name: "AdamW, 100 tensors of 10", tensors: 100, elements: 10, ..ONE };

const SCENARIOS: &[Scenario] = &[
    ONE,
    Scenario {
        name: "SGD with momentum, one tensor of 16",
        optimizer: "SGD",
        hypers: &[("momentum", Value::Float(0.9))],
        ..ONE
    },
    MANY,
    Scenario { name: "AdamW, 100 tensors of 10, a group each", group_each: true, ..MANY },
    Scenario { name: "AdamW, 100 tensors of 10, clip_norm", clip_norm: Some(1.0), ..MANY },
];

/// Steps, without keeping or printing anything.
fn run(scenario: &Scenario, steps: usize) -> roptim::Result<()> {
    let &Scenario { tensors, elements, clip_norm, .. } = scenario;
    let guard = Guard { clip_norm, ..Guard::default() };
    let options = Options { threads: Some(1), guard, ..Options::default() };
    let mut optimizer = Optimizer::cpu(scenario.optimizer, &options)?;
    let infos: Vec<_> = (0..tensors).map(|i| ParamInfo::vector(&i.to_string(), elements, Dtype::F32)).collect();
    for group in infos.chunks(if scenario.group_each { 1 } else { tensors }) {
        optimizer.add_group(scenario.hypers, group.to_vec())?;
    }
    let gradient: Vec<f32> = (1..=elements).map(|i| i as f32 / elements as f32).collect();
    let mut parameters = vec![vec![1.0f32; elements]; tensors];
    // What a caller keeps between steps; only views of parameters are made anew in each.
    let gradients = vec![Some(gradient.as_slice().into()); tensors];
    for _ in 0..steps {
        let mut views: Vec<_> = parameters.iter_mut().map(|p| p.as_mut_slice().into()).collect();
        optimizer.step(&mut views, &gradients)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [] => SCENARIOS.iter().for_each(|scenario| println!("{}", scenario.name)),
        ["isa"] => println!("{}", Isa::detect().name()),
        [name, steps] => {
            let scenario = SCENARIOS.iter().find(|scenario| scenario.name == name);
            let (Some(scenario), Ok(steps)) = (scenario, steps.parse()) else {
                eprintln!("fixed_cost: a scenario and a number of steps, got {name:?} and {steps:?}");
                return ExitCode::from(2);
            };
            if let Err(error) = run(scenario, steps) {
                eprintln!("{name}: {error}");
                return ExitCode::FAILURE;
            }
        }
        _ => {
            eprintln!("fixed_cost: a scenario and a number of steps, or nothing, or `isa`; got {arguments:?}");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}
