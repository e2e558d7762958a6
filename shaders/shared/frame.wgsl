// Twin of `Frame` in src/cpu/run.rs: what happens to every element before and after the rule.

const L2: u32 = 1u;
const FLUSH_SUBNORMALS: u32 = 2u;

// The shared pre- and post-steps of a group. Neutral values change no bit.
struct Frame {
    gradient_factor: f32,
    l2: f32,
    shrink: f32,
    switches: u32,
}

fn prepared(frame: Frame, control: Control, p: vec4<f32>, gradient: vec4<f32>) -> vec4<f32> {
    let within = within_bound(control.switches, control.bound, gradient);
    let g = within * (frame.gradient_factor * bitcast<f32>(control.factor));
    return select(g, g + frame.l2 * p, (frame.switches & L2) != 0u);
}

fn stored(frame: Frame, value: vec4<f32>, inside: vec4<bool>) -> vec4<f32> {
    let flushes = vec4<bool>((frame.switches & FLUSH_SUBNORMALS) != 0u);
    return select(value, vec4<f32>(0.0), (flushes & is_below_normal(value)) | !inside);
}
