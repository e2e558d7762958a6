// The second pass of the guard: one workgroup for all chunks.

const NOT_A_NUMBER: u32 = 0x7fc00000u;
const ONE: u32 = 0x3f800000u;
// That of an infinite bound.
const UNBOUNDED_EXPONENT: i32 = 1000;

// max_norm/(norm + 1e-6) for a norm of √sum·2^exponent, at most 1.
fn clip_factor(control: Control, sum: Double, exponent: i32) -> f32 {
    // Both terms are brought to one exponent, which keeps the constant small enough.
    let base = max(exponent, -20);
    let epsilon = double_scaled(Double(vec4<f32>(control.epsilon_hi), vec4<f32>(control.epsilon_lo)), -base);
    let divisor = add(double_scaled(root(sum), exponent - base), epsilon);
    let quotient = divided(Double(vec4<f32>(control.max_hi), vec4<f32>(control.max_lo)), divisor);
    return min(scaled(quotient.hi.x, control.max_exponent - base), 1.0);
}

@compute @workgroup_size(WORKGROUP)
fn decide(@builtin(local_invocation_index) lane: u32) {
    let control = work.control;
    unseen_zero = control.zero;
    var found = 0u;
    // Shifted, so that the lanes' largest is one of unsigned numbers.
    var largest = 0u;
    for (var i = lane; i < control.chunks; i += WORKGROUP) {
        found |= partials[i].found;
        largest = max(largest, select(0u, u32(partials[i].exponent + 200), partials[i].hi > 0.0));
    }
    found = any_of_lanes(lane, found);
    let scaled_exponent = i32(largest_of_lanes(lane, largest)) - 200;
    let exponent = scaled_exponent - control.scale_exponent;
    var sum = double(vec4<f32>(0.0));
    for (var i = lane; i < control.chunks; i += WORKGROUP) {
        let partial = partials[i];
        let one = Double(vec4<f32>(partial.hi, 0.0, 0.0, 0.0), vec4<f32>(partial.lo, 0.0, 0.0, 0.0));
        sum = add(sum, double_scaled(one, 2 * (partial.exponent - scaled_exponent)));
    }
    let total = sum_of_lanes(lane, sum);
    if (lane != 0u) {
        return;
    }
    work.control.found = found;
    if ((control.switches & SKIPS) != 0u && found != 0u) {
        work.control.skip = 1u;
    }
    if ((control.switches & CLIPS_NORM) == 0u) {
        return;
    }
    let norm = root(total);
    work.control.norm_hi = norm.hi.x;
    work.control.norm_lo = norm.lo.x;
    work.control.norm_exponent = exponent;
    if ((found & HAS_NAN) != 0u) {
        work.control.factor = NOT_A_NUMBER;
    } else if ((found & HAS_INFINITY) != 0u && (control.switches & BOUNDED) == 0u) {
        // A finite bound over an infinite norm; an infinite one clips nothing.
        work.control.factor = select(0u, ONE, control.max_exponent >= UNBOUNDED_EXPONENT);
    } else {
        work.control.factor = bitcast<u32>(clip_factor(control, total, exponent));
    }
}
